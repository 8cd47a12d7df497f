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

  // The sum of a[i + n] b[j + n] over n < count, as four sums that need not wait for each other.
  function dot(a, i, b, j, count) {
    let s = 0;
    let t = 0;
    let u = 0;
    let v = 0;
    const end = i + count;
    for (; i + 4 <= end; i += 4, j += 4) {
      s += a[i] * b[j];
      t += a[i + 1] * b[j + 1];
      u += a[i + 2] * b[j + 2];
      v += a[i + 3] * b[j + 3];
    }
    for (; i < end; i++, j++) s += a[i] * b[j];
    return s + t + (u + v);
  }

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
        for (let o = 0; o < outputs; o++)
          y[o] = weights[bias + o] + dot(weights, weight + o * inputs, x, 0, inputs);
        return y;
      };
    },

    gated({ value, gate }, weights) {
      const values = LAYERS[value.kind](value, weights);
      const gates = LAYERS[gate.kind](gate, weights);
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

    // Channels last, in the picture and in the weights, so that each tap is one run of memory.
    convolution(spec, weights) {
      const { inputs, outputs, kernel, stride, padding, transposed, weight, bias } = spec;
      const [height, width, outHeight, outWidth] = spec.sides;
      const [area, outArea, taps] = [height * width, outHeight * outWidth, kernel * kernel];

      const packed = new Float32Array(outputs * taps * inputs);
      for (let o = 0, n = 0; o < outputs; o++)
        for (let tap = 0; tap < taps; tap++)
          for (let i = 0; i < inputs; i++)
            packed[n++] =
              weights[weight + (transposed ? i * outputs + o : o * inputs + i) * taps + tap];

      // For every place along one side of the output and every tap, the input it reads, or -1.
      const sources = (outSize, size) =>
        Int32Array.from({ length: outSize * kernel }, (_, n) => {
          const [place, tap] = [Math.floor(n / kernel), n % kernel];
          const step = transposed
            ? (place + padding - tap) / stride
            : place * stride + tap - padding;
          return Number.isInteger(step) && step >= 0 && step < size ? step : -1;
        });
      const rows = sources(outHeight, height);
      const columns = sources(outWidth, width);

      const last = new Float64Array(area * inputs);
      const y = new Float64Array(outputs * outArea);
      return (x) => {
        for (let i = 0; i < inputs; i++)
          for (let p = 0; p < area; p++) last[p * inputs + i] = x[i * area + p];
        for (let o = 0; o < outputs; o++) {
          for (let p = 0; p < outArea; p++) {
            const top = Math.floor(p / outWidth) * kernel;
            const left = (p % outWidth) * kernel;
            let sum = weights[bias + o];
            for (let tap = 0; tap < taps; tap++) {
              const row = rows[top + Math.floor(tap / kernel)];
              const column = columns[left + (tap % kernel)];
              if (row < 0 || column < 0) continue;
              const from = (o * taps + tap) * inputs;
              const at = (row * width + column) * inputs;
              sum += dot(packed, from, last, at, inputs);
            }
            y[o * outArea + p] = sum;
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
