// The likelihoods in plain JavaScript, params -> x: the mean E[x | z], and draws. Each row follows
// the class of its name in `likelihoods.py`; the tests hold the two together.
"use strict";

const likelihoods = (() => {
  const { sigmoid, softplus, normalCdf } = networks;

  // Random numbers that are a function of (seed, element): a draw keeps its noise while z moves.
  const mix = (n) => {
    n = Math.imul(n ^ (n >>> 16), 0x21f0aaad);
    n = Math.imul(n ^ (n >>> 15), 0x735a2d97);
    return (n ^ (n >>> 15)) >>> 0;
  };
  let state = 0;
  const start = (seed, element) => (state = mix(mix(seed + 1) ^ (element + 1)));
  const uniform = () => (mix((state = (state + 0x9e3779b9) | 0)) + 0.5) / 2 ** 32;
  const normal = () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());

  // The logarithm of a Gamma(shape, 1) variable: the variable itself underflows at small shapes.
  // Source: Marsaglia and Tsang, A Simple Method for Generating Gamma Variables (2000)
  function logGamma(shape) {
    if (shape < 1) return logGamma(shape + 1) + Math.log(uniform()) / shape;
    const d = shape - 1 / 3;
    for (;;) {
      const n = normal();
      const v = (1 + n / Math.sqrt(9 * d)) ** 3;
      if (v > 0 && Math.log(uniform()) < n * n / 2 + d * (1 - v + Math.log(v)))
        return Math.log(d * v);
    }
  }

  const positive = (raw, atZero) => softplus(raw + Math.log(Math.expm1(atZero - 1e-5))) + 1e-5;

  // (1/L) sum over k = 1..L of sigmoid((loc - (k - 1/2)/L) / scale): the terms far below loc are 1
  // and those far above it 0. A wide logistic needs none of them: the sum is then the midpoint
  // rule, whose distance from the integral the Euler-Maclaurin series tells.
  function logisticMean(loc, scale, levels) {
    const h = 1 / levels;
    if (scale < 2 * h) {
      const reach = 20 * scale;
      const low = Math.min(levels, Math.max(0, Math.floor((loc - reach) * levels)));
      const high = Math.min(levels, Math.max(0, Math.ceil((loc + reach) * levels)));
      let sum = low;
      for (let k = low + 1; k <= high; k++) sum += sigmoid((loc - (k - 0.5) * h) / scale);
      return sum / levels;
    }
    const [a, b] = [sigmoid(loc / scale), sigmoid((loc - 1) / scale)];
    const [slopeA, slopeB] = [a * (1 - a), b * (1 - b)];
    const r = h / scale;
    const integral = scale * (softplus(loc / scale) - softplus((loc - 1) / scale));
    const first = (r * h * (slopeB - slopeA)) / 24;
    const third = slopeB * (1 - 6 * slopeB) - slopeA * (1 - 6 * slopeA);
    return integral + first - (7 * r ** 3 * h * third) / 5760;
  }

  function logisticDraw(loc, scale, levels) {
    const u = uniform();
    const x = loc + scale * Math.log(u / (1 - u));
    return Math.round(Math.min(1, Math.max(0, x)) * levels) / levels;
  }

  // E sigmoid(y) by the trapezoidal rule, over the normal variable of a narrow y and over the
  // logistic one of a wide y: as in `distributions.LogitNormal`.
  function logitNormalMean(loc, scale) {
    const narrow = scale <= 1;
    const steps = narrow ? 12 : 40;
    let sum = 0;
    let total = 0;
    for (let n = -steps; n <= steps; n++) {
      const e = n / 2;
      const weight = narrow ? Math.exp((-e * e) / 2) : sigmoid(e) * sigmoid(-e);
      total += weight;
      sum += weight * (narrow ? sigmoid(loc + scale * e) : normalCdf((loc - e) / scale));
    }
    return sum / total;
  }

  // softmax over count logits, into `out`, which is kept from call to call.
  function softmax(logit, count, out) {
    let top = -Infinity;
    for (let k = 0; k < count; k++) top = Math.max(top, (out[k] = logit(k)));
    let sum = 0;
    for (let k = 0; k < count; k++) sum += out[k] = Math.exp(out[k] - top);
    for (let k = 0; k < count; k++) out[k] /= sum;
  }

  function choose(weights) {
    let left = uniform();
    let k = 0;
    while (k < weights.length - 1 && (left -= weights[k]) > 0) k++;
    return k;
  }

  // For every likelihood: the mean of element i and a draw of it, from `raw(k, i)`, the k-th
  // parameter of element i.
  const FAMILIES = {
    bernoulli: (spec, raw) => ({
      mean: (i) => sigmoid(raw(0, i)),
      sample: (i) => (uniform() < sigmoid(raw(0, i)) ? 1 : 0),
    }),

    "continuous-bernoulli": (spec, raw) => ({
      mean(i) {
        const t = raw(0, i);
        if (Math.abs(t) < 0.05) return 0.5 + t / 12 - t ** 3 / 720;
        return -1 / Math.expm1(-t) - 1 / t;
      },
      sample(i) {
        const [t, u] = [raw(0, i), uniform()];
        if (Math.abs(t) < 1e-6) return u;
        if (t > 0) return 1 + Math.log(u + (1 - u) * Math.exp(-t)) / t;
        return Math.log1p(u * Math.expm1(t)) / t;
      },
    }),

    gaussian: (spec, raw) => located(spec, raw, normal),

    laplace: (spec, raw) => located(spec, raw, () => Math.log(uniform() / uniform())),

    "student-t": (spec, raw) =>
      located(spec, raw, () =>
        normal() * Math.exp((Math.log(spec.df / 2) - logGamma(spec.df / 2)) / 2)),

    beta: (spec, raw) => ({
      mean(i) {
        const a = positive(raw(0, i), 1);
        return a / (a + positive(raw(1, i), 1));
      },
      sample: (i) =>
        sigmoid(logGamma(positive(raw(0, i), 1)) - logGamma(positive(raw(1, i), 1))),
    }),

    "logit-normal": (spec, raw) => ({
      mean: (i) => logitNormalMean(loc(spec, raw, i), scale(spec, raw, i)),
      sample: (i) => sigmoid(loc(spec, raw, i) + scale(spec, raw, i) * normal()),
    }),

    "discretized-logistic": (spec, raw) => ({
      mean: (i) => logisticMean(loc(spec, raw, i), scale(spec, raw, i), spec.levels),
      sample: (i) => logisticDraw(loc(spec, raw, i), scale(spec, raw, i), spec.levels),
    }),

    "discretized-logistic-mixture": (spec, raw) =>
      spec.coupling ? coupledMixture(spec, raw) : mixture(spec, raw),

    categorical(spec, raw) {
      const p = new Float64Array(spec.levels + 1);
      const weigh = (i) => softmax((k) => raw(k, i), p.length, p);
      return {
        mean(i) {
          weigh(i);
          return p.reduce((sum, weight, k) => sum + weight * k, 0) / spec.levels;
        },
        sample(i) {
          weigh(i);
          return choose(p) / spec.levels;
        },
      };
    },
  };

  const loc = (spec, raw, i) => spec.centre + raw(0, i);
  const scale = (spec, raw, i) => spec.scale ?? positive(raw(1, i), spec.spread);

  const located = (spec, raw, standard) => ({
    mean: (i) => loc(spec, raw, i),
    sample: (i) => loc(spec, raw, i) + scale(spec, raw, i) * standard(),
  });

  function mixture({ components: M, levels }, raw) {
    const weights = new Float64Array(M);
    const weigh = (i) => softmax((m) => raw(m, i), M, weights);
    const locOf = (m, i) => raw(M + m, i) + (m + 0.5) / M;
    const scaleOf = (m, i) => positive(raw(2 * M + m, i), 0.1);
    return {
      mean(i) {
        weigh(i);
        let sum = 0;
        for (let m = 0; m < M; m++)
          sum += weights[m] * logisticMean(locOf(m, i), scaleOf(m, i), levels);
        return sum;
      },
      sample(i) {
        weigh(i);
        const m = choose(weights);
        return logisticDraw(locOf(m, i), scaleOf(m, i), levels);
      },
    };
  }

  // One component for the three channels of a pixel; green and blue shift with those before them,
  // which are computed again for each: the noise of a pixel is the same every time.
  function coupledMixture({ components: M, levels, elements }, raw) {
    const area = elements / 3;
    const weights = new Float64Array(M);
    const weigh = (pixel) => softmax((m) => raw(m, pixel), M, weights);
    function channel(value, m, c, pixel) {
      const at = (kind, which) => raw(M + (kind * M + m) * 3 + which, pixel);
      const of = (which, shift) =>
        value(at(0, which) + (m + 0.5) / M + shift, positive(at(1, which), 0.1), levels);
      const red = of(0, 0);
      if (c === 0) return red;
      const green = of(1, Math.tanh(at(2, 0)) * (red - 0.5));
      if (c === 1) return green;
      return of(2, Math.tanh(at(2, 1)) * (red - 0.5) + Math.tanh(at(2, 2)) * (green - 0.5));
    }
    return {
      stride: area,
      mean(i) {
        const pixel = i % area;
        weigh(pixel);
        let sum = 0;
        for (let m = 0; m < M; m++)
          sum += weights[m] * channel(logisticMean, m, Math.floor(i / area), pixel);
        return sum;
      },
      sample(i) {
        const pixel = i % area;
        weigh(pixel);
        return channel(logisticDraw, choose(weights), Math.floor(i / area), pixel);
      },
    };
  }

  // mean(params, x) and sample(params, x, seed) fill x, one number for each element.
  function likelihood(spec) {
    let params = null;
    let stride = spec.elements;
    const family = FAMILIES[spec.name](spec, (k, i) => params[k * stride + i]);
    stride = family.stride ?? stride;
    return {
      mean(from, x) {
        params = from;
        for (let i = 0; i < x.length; i++) x[i] = family.mean(i);
      },
      sample(from, x, seed) {
        params = from;
        for (let i = 0; i < x.length; i++) {
          start(seed, i % stride);
          x[i] = family.sample(i);
        }
      },
    };
  }

  return { build: likelihood, start, normal };
})();
