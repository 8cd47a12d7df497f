// The layers of a decoder in plain JavaScript, z -> params, from the list that `explore.py` writes.
// The tests hold them to torch's output. Weights are float32 as in torch; sums and activations are
// float64, so all that differs is torch's own rounding.
"use strict";

const networks = (() => {
  const sigmoid = (x) => 1 / (1 + Math.exp(-x));
  const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));

  // erf from a table and its derivative, by cubic Hermite interpolation: the error is below 1e-8.
  const ERF_STEPS = 64;
  const ERF_END = 6;
  const erfSlope = (x) => (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x);
  const erfTable = Float64Array.from({ length: ERF_STEPS * ERF_END + 2 }, (_, i) => {
    const x = i / ERF_STEPS;
    let term = x;
    let sum = x;
    for (let n = 1; n < 150; n++) sum += term *= (2 * x * x) / (2 * n + 1);
    return sum * erfSlope(x);
  });
  function erf(x) {
    const size = Math.abs(x);
    if (size >= ERF_END) return Math.sign(x);
    const i = Math.floor(size * ERF_STEPS);
    const t = size * ERF_STEPS - i;
    const rise = erfTable[i + 1] - erfTable[i];
    const left = erfSlope(i / ERF_STEPS) / ERF_STEPS - rise;
    const right = rise - erfSlope((i + 1) / ERF_STEPS) / ERF_STEPS;
    const value = erfTable[i] + t * rise + t * (1 - t) * (left * (1 - t) + right * t);
    return x < 0 ? -value : value;
  }
  const normalCdf = (x) => 0.5 * (1 + erf(x / Math.SQRT2));

  const ACTIVATIONS = {
    elu: (x) => (x > 0 ? x : Math.expm1(x)),
    gelu: (x) => x * normalCdf(x),
    "leaky-relu": (x) => (x > 0 ? x : 0.01 * x),
    relu: (x) => (x > 0 ? x : 0),
    silu: (x) => x * sigmoid(x),
    softplus,
    tanh: Math.tanh,
  };

  // Each layer owns the array it writes to, so that nothing is allocated while a picture moves.
  const LAYERS = {
    activation({ size, name }) {
      const f = ACTIVATIONS[name];
      const y = new Float64Array(size);
      return (x) => {
        for (let i = 0; i < size; i++) y[i] = f(x[i]);
        return y;
      };
    },

    linear({ inputs, outputs, weight, bias }, weights) {
      const y = new Float64Array(outputs);
      return (x) => {
        for (let o = 0, w = weight; o < outputs; o++) {
          let sum = weights[bias + o];
          for (let i = 0; i < inputs; i++, w++) sum += weights[w] * x[i];
          y[o] = sum;
        }
        return y;
      };
    },

    gated({ value, gate }, weights) {
      const values = LAYERS.linear(value, weights);
      const gates = LAYERS.linear(gate, weights);
      return (x) => {
        const y = values(x);
        const g = gates(x);
        for (let i = 0; i < y.length; i++) y[i] *= sigmoid(g[i]);
        return y;
      };
    },

    residual({ size, layers }, weights) {
      const inner = chain(layers, weights);
      const y = new Float64Array(size);
      return (x) => {
        const change = inner(x);
        for (let i = 0; i < size; i++) y[i] = x[i] + change[i];
        return y;
      };
    },

    // A convolution reads where its transpose writes: position small * stride + tap - padding of
    // the larger picture meets `small` of the smaller one.
    convolution(spec, weights) {
      const { inputs, outputs, kernel, stride, padding, transposed, weight, bias } = spec;
      const [height, width, outHeight, outWidth] = spec.sides;
      const [smallHeight, smallWidth] = transposed ? [height, width] : [outHeight, outWidth];
      const [bigHeight, bigWidth] = transposed ? [outHeight, outWidth] : [height, width];
      const area = outHeight * outWidth;
      const y = new Float64Array(outputs * area);
      const first = (tap) => Math.max(0, Math.ceil((padding - tap) / stride));
      const last = (tap, small, big) =>
        Math.min(small - 1, Math.floor((big - 1 + padding - tap) / stride));

      return (x) => {
        for (let o = 0; o < outputs; o++) y.fill(weights[bias + o], o * area, (o + 1) * area);
        for (let o = 0; o < outputs; o++) {
          for (let i = 0; i < inputs; i++) {
            const pair = transposed ? i * outputs + o : o * inputs + i;
            for (let ky = 0; ky < kernel; ky++) {
              const bottom = last(ky, smallHeight, bigHeight);
              for (let kx = 0; kx < kernel; kx++) {
                const w = weights[weight + (pair * kernel + ky) * kernel + kx];
                const left = first(kx);
                const count = last(kx, smallWidth, bigWidth) - left + 1;
                for (let row = first(ky); row <= bottom; row++) {
                  const bigRow = row * stride + ky - padding;
                  const bigLeft = left * stride + kx - padding;
                  if (transposed) {
                    let to = o * area + bigRow * outWidth + bigLeft;
                    let from = i * height * width + row * width + left;
                    for (let n = 0; n < count; n++, to += stride) y[to] += w * x[from++];
                  } else {
                    let to = o * area + row * outWidth + left;
                    let from = i * height * width + bigRow * width + bigLeft;
                    for (let n = 0; n < count; n++, from += stride) y[to++] += w * x[from];
                  }
                }
              }
            }
          }
        }
        return y;
      };
    },
  };

  function chain(layers, weights) {
    const steps = layers.map((spec) => LAYERS[spec.kind](spec, weights));
    return (x) => {
      for (let i = 0; i < steps.length; i++) x = steps[i](x);
      return x;
    };
  }

  // What `explore.py` wrote as base64: little-endian float32 numbers, or bytes.
  function bytes(text) {
    const binary = atob(text);
    const array = new Uint8Array(binary.length);
    for (let i = 0; i < array.length; i++) array[i] = binary.charCodeAt(i);
    return array;
  }
  const floats = (text) => new Float32Array(bytes(text).buffer);

  return { build: chain, bytes, floats, sigmoid, softplus, normalCdf };
})();
