// What litevae/native.py calls on CPUs: 3x3 convolutions and group normalisation with SiLU, in fp32, channels last.
//
// Convolutions are Winograd's F(4x4, 3x3) (Lavin and Gray 2016): of 4x4 outputs, 36 products a pair of maps instead of
// 144. Its points are 0, +-3/4, +-3/2 and infinity, whose constants are exact in binary: the error is that of a direct
// convolution in fp32, where the usual 0, +-1, +-2 lose a digit.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

namespace {

constexpr int L = 8;                                                                // floats a vector
constexpr int PANEL = 2 * L;                                                        // output maps of a micro-kernel
constexpr int ROWS = 6;                                                             // its tiles
constexpr int ADDED = 64;                                                           // pixels summed in floats
constexpr int K_BLOCK = 256;                                                        // input maps at a time
typedef float vec __attribute__((vector_size(32)));                                 // in registers
typedef float loose __attribute__((vector_size(32), aligned(4), may_alias));        // in memory, anywhere
typedef int32_t ints __attribute__((vector_size(32)));

inline vec load(const float* p) { return *(const loose*)p; }
inline void store(float* p, vec v) { *(loose*)p = v; }
inline vec all(float x) { return vec{x, x, x, x, x, x, x, x}; }

// The first n floats of a vector; the rest is 0 and stays unwritten.
inline vec load_part(const float* p, int n) {
  float part[L] = {};
  std::memcpy(part, p, n * sizeof(float));
  return load(part);
}
inline void store_part(float* p, vec v, int n) { std::memcpy(p, &v, n * sizeof(float)); }

constexpr float A = 0.75f, B = 1.5f, A2 = A * A, B2 = B * B, AB = A2 * B2, SUM = A2 + B2;

inline void transform_input(const vec* d, int step, vec* r, int to) {
  vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  vec ea = d4 - B2 * d2, oa = A * (d3 - B2 * d1), eb = d4 - A2 * d2, ob = B * (d3 - A2 * d1);
  r[0] = AB * d0 - SUM * d2 + d4;
  r[to] = ea + oa;
  r[2 * to] = ea - oa;
  r[3 * to] = eb + ob;
  r[4 * to] = eb - ob;
  r[5 * to] = AB * d1 - SUM * d3 + d5;
}

inline void transform_output(const vec* m, int step, vec* y, int to) {
  vec sa = m[step] + m[2 * step], da = m[step] - m[2 * step];
  vec sb = m[3 * step] + m[4 * step], db = m[3 * step] - m[4 * step];
  y[0] = m[0] + sa + sb;
  y[to] = A * da + B * db;
  y[2 * to] = A2 * sa + B2 * sb;
  y[3 * to] = A * A2 * da + B * B2 * db + m[5 * step];
}

// m (rows, PANEL) = or += v (rows, k) u (k, PANEL), rows being at most ROWS.
template <int N>
inline void multiply(const float* v, int64_t v_step, const float* u, int k, float* m, int64_t m_step, bool add) {
  vec sum[N][2];
  for (int r = 0; r < N; r++)
    for (int h = 0; h < 2; h++) sum[r][h] = add ? load(m + r * m_step + h * L) : all(0);
  for (int i = 0; i < k; i++) {
    vec u0 = load(u + i * PANEL), u1 = load(u + i * PANEL + L);
#pragma GCC unroll 6
    for (int r = 0; r < N; r++) {
      vec x = all(v[r * v_step + i]);
      sum[r][0] += x * u0;
      sum[r][1] += x * u1;
    }
  }
  for (int r = 0; r < N; r++)
    for (int h = 0; h < 2; h++) store(m + r * m_step + h * L, sum[r][h]);
}

void multiply_rows(int rows, const float* v, int64_t v_step, const float* u, int k, float* m, int64_t m_step, bool add) {
  switch (rows) {
    case 6: return multiply<6>(v, v_step, u, k, m, m_step, add);
    case 5: return multiply<5>(v, v_step, u, k, m, m_step, add);
    case 4: return multiply<4>(v, v_step, u, k, m, m_step, add);
    case 3: return multiply<3>(v, v_step, u, k, m, m_step, add);
    case 2: return multiply<2>(v, v_step, u, k, m, m_step, add);
    default: return multiply<1>(v, v_step, u, k, m, m_step, add);
  }
}

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// exp to 2e-7, for x of at most 87 in size: 2^n times a polynomial on [-ln2/2, ln2/2].
inline vec exponential(vec x) {
  const vec large = all(12582912.0f);  // to which, in floats, only whole numbers can be added
  vec shifted = x * 1.44269504f + large, n = shifted - large;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln2 in two parts
  vec p = all(0.00831252616f);  // minimax in relative error
  p = p * r + 0.0418901145f;
  p = p * r + 0.166671142f;
  p = p * r + 0.499992311f;
  p = p * r * r + r + 1.0f;
  ints exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

// x / (1 + exp(-x)); beyond 87 exp(-x) is 0, or all that counts.
inline vec silu(vec x) {
  vec bounded = x < all(-87.0f) ? all(-87.0f) : x;
  bounded = bounded > all(87.0f) ? all(87.0f) : bounded;
  return x / (1.0f + exponential(-bounded));
}

}  // namespace

extern "C" {

// Floats of a convolution's packed weights: 36 products, panels of output maps, input maps, PANEL.
int64_t packed_size(int64_t in, int64_t out) { return 36 * up(out, PANEL) * in; }

// weights (out, in, 3, 3) -> packed, in doubles until they are rounded once.
void pack(const float* weights, int64_t in, int64_t out, float* packed) {
  const double a = A, b = B, na = 1 / (2 * a * a * (a * a - b * b)), nb = 1 / (2 * b * b * (b * b - a * a));
  const double g[6][3] = {{1 / (a * a * b * b), 0, 0}, {na, na * a, na * a * a},   {na, -na * a, na * a * a},
                          {nb, nb * b, nb * b * b},    {nb, -nb * b, nb * b * b}, {0, 0, 1}};
  const int64_t panels = up(out, PANEL) / PANEL;
  std::fill(packed, packed + packed_size(in, out), 0.0f);
#pragma omp parallel for
  for (int64_t o = 0; o < out; o++)
    for (int64_t i = 0; i < in; i++) {
      const float* w = weights + (o * in + i) * 9;
      for (int y = 0; y < 6; y++)
        for (int x = 0; x < 6; x++) {
          double sum = 0;
          for (int r = 0; r < 3; r++)
            for (int s = 0; s < 3; s++) sum += g[y][r] * g[x][s] * w[3 * r + s];
          packed[(((y * 6 + x) * panels + o / PANEL) * in + i) * PANEL + o % PANEL] = (float)sum;
        }
    }
}

// y (n, h, w, out) = convolution of x (n, h, w, in) with padding 1, plus bias (out) and `added` (n, h, w, out), either
// of which may be null. Returns 0, or 1 where memory was refused.
int convolve(const float* x, const float* packed, const float* bias, const float* added, float* y, int64_t n, int64_t h,
             int64_t w, int64_t in, int64_t out) {
  const int64_t across = (w + 3) / 4, down = (h + 3) / 4, tiles = n * down * across;
  const int64_t in_step = up(in, L), out_step = up(out, PANEL), panels = out_step / PANEL;
  // Of a block, what goes into the products and comes out of them lies in the second-level cache; with many maps more
  // tiles, since each block reads all weights.
  const int64_t fit = in + out <= 256 ? 100000 / (36 * (in_step + out_step)) : 48;
  const int64_t block = std::max<int64_t>(4 * ROWS, fit / ROWS * ROWS), blocks = (tiles + block - 1) / block;
  const int64_t v_product = block * in_step + PANEL, m_product = block * out_step + PANEL;  // odd: no shared cache sets
  bool refused = false;
#pragma omp parallel
  {
    float* space = (float*)std::aligned_alloc(64, up(36 * (v_product + m_product) * sizeof(float), 64));
    if (!space) {
#pragma omp atomic write
      refused = true;
    }
    float *v = space, *m = space + 36 * v_product;
#pragma omp for schedule(static)
    for (int64_t number = 0; number < blocks; number++) {
      if (!space) continue;
      const int64_t first = number * block, count = std::min(block, tiles - first);
      for (int64_t t = 0; t < count; t++) {
        const int64_t tile = first + t, left = tile % across * 4 - 1, top = tile / across % down * 4 - 1;
        const float* image = x + tile / (across * down) * h * w * in;
        const bool inside = left >= 0 && top >= 0 && left + 6 <= w && top + 6 <= h;
        for (int64_t c = 0; c < in; c += L) {
          const int part = (int)std::min<int64_t>(L, in - c);
          vec d[36], half[36];
          for (int r = 0; r < 6; r++)
            for (int s = 0; s < 6; s++) {
              const int64_t row = top + r, column = left + s;
              if (!inside && (row < 0 || row >= h || column < 0 || column >= w)) {
                d[6 * r + s] = all(0);
                continue;
              }
              const float* pixel = image + (row * w + column) * in + c;
              d[6 * r + s] = part == L ? load(pixel) : load_part(pixel, part);
            }
          for (int s = 0; s < 6; s++) transform_input(d + s, 6, half + s, 6);
          for (int r = 0; r < 6; r++) transform_input(half + 6 * r, 1, d + 6 * r, 1);
          float* to = v + t * in_step + c;
          for (int k = 0; k < 36; k++) store(to + k * v_product, d[k]);
        }
      }
      for (int k = 0; k < 36; k++)
        for (int64_t panel = 0; panel < panels; panel++)
          for (int64_t c = 0; c < in; c += K_BLOCK) {
            const float* u = packed + ((k * panels + panel) * in + c) * PANEL;
            const int depth = (int)std::min<int64_t>(K_BLOCK, in - c);
            for (int64_t t = 0; t < count; t += ROWS)
              multiply_rows((int)std::min<int64_t>(ROWS, count - t), v + k * v_product + t * in_step + c, in_step, u,
                            depth, m + k * m_product + t * out_step + panel * PANEL, out_step, c > 0);
          }
      for (int64_t t = 0; t < count; t++) {
        const int64_t tile = first + t, left = tile % across * 4, top = tile / across % down * 4;
        const int64_t place = tile / (across * down) * h * w * out;
        for (int64_t c = 0; c < out; c += L) {
          const int part = (int)std::min<int64_t>(L, out - c);
          vec d[36], half[24], r[16];
          const float* from = m + t * out_step + c;
          for (int k = 0; k < 36; k++) d[k] = load(from + k * m_product);
          for (int s = 0; s < 6; s++) transform_output(d + s, 6, half + s, 6);
          for (int q = 0; q < 4; q++) transform_output(half + 6 * q, 1, r + 4 * q, 1);
          const vec shift = bias ? load_part(bias + c, part) : all(0);
          for (int q = 0; q < 4; q++)
            for (int s = 0; s < 4; s++) {
              if (top + q >= h || left + s >= w) continue;
              const int64_t pixel = place + ((top + q) * w + left + s) * out + c;
              vec value = r[4 * q + s] + shift;
              if (part == L) {
                store(y + pixel, added ? value + load(added + pixel) : value);
              } else {
                store_part(y + pixel, added ? value + load_part(added + pixel, part) : value, part);
              }
            }
        }
      }
    }
    std::free(space);
  }
  return refused;
}

// y (n, pixels, channels) = SiLU, or not, of the group normalisation of x; y may be x. scale and shift are (channels).
// Returns 0, or 1 where memory was refused. Sums are of differences to each channel's first pixel, in doubles from 64
// pixels on: a large mean costs no digits.
int normalise(const float* x, const float* scale, const float* shift, float* y, int64_t n, int64_t pixels,
              int64_t channels, int64_t groups, float eps, int activate) {
  const int64_t chunk = std::max<int64_t>(256, up(65536 / channels, 256)), chunks = (pixels + chunk - 1) / chunk;
  const int64_t step = up(channels, L), width = channels / groups;
  std::vector<double> sums;
  std::vector<float> factors;
  try {
    sums.resize(n * chunks * 2 * channels);
    factors.resize(n * 2 * step);
  } catch (const std::exception&) {
    return 1;
  }
#pragma omp parallel
  {
    std::vector<float> part(2 * step);
#pragma omp for schedule(static)
    for (int64_t job = 0; job < n * chunks; job++) {
      const int64_t image = job / chunks, start = job % chunks * chunk, end = std::min(pixels, start + chunk);
      const float* origin = x + image * pixels * channels;
      double* total = sums.data() + job * 2 * channels;
      for (int64_t begin = start; begin < end; begin += ADDED) {
        const int64_t last = std::min(end, begin + ADDED);
        for (int64_t c = 0; c < channels; c += L) {
          const int size = (int)std::min<int64_t>(L, channels - c);
          const vec zero = size == L ? load(origin + c) : load_part(origin + c, size);
          vec sum[4] = {}, squares[4] = {};  // four, or each addition would wait for the one before
          for (int64_t p = begin; p < last; p += 4)
            for (int64_t q = 0; q < std::min<int64_t>(4, last - p); q++) {
              const float* at = origin + (p + q) * channels + c;
              const vec value = (size == L ? load(at) : load_part(at, size)) - zero;
              sum[q] += value;
              squares[q] += value * value;
            }
          store(part.data() + c, sum[0] + sum[1] + (sum[2] + sum[3]));
          store(part.data() + step + c, squares[0] + squares[1] + (squares[2] + squares[3]));
        }
        for (int64_t c = 0; c < channels; c++) {
          total[c] += part[c];
          total[channels + c] += part[step + c];
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t job = 0; job < n * groups; job++) {
      const int64_t image = job / groups, first = job % groups * width;
      const float* origin = x + image * pixels * channels;
      double sum = 0, squares = 0;  // of differences to the group's first channel's first pixel
      for (int64_t c = first; c < first + width; c++) {
        const double offset = (double)origin[c] - origin[first];
        double one = 0, two = 0;
        for (int64_t k = 0; k < chunks; k++) {
          const double* total = sums.data() + (image * chunks + k) * 2 * channels;
          one += total[c];
          two += total[channels + c];
        }
        sum += one + offset * pixels;
        squares += two + 2 * offset * one + offset * offset * pixels;
      }
      const double mean = sum / (width * pixels), variance = std::max(0.0, squares / (width * pixels) - mean * mean);
      const double inverse = 1 / __builtin_sqrt(variance + eps);
      for (int64_t c = first; c < first + width; c++) {
        const double factor = inverse * (scale ? scale[c] : 1);
        factors[image * 2 * step + c] = (float)factor;
        factors[image * 2 * step + step + c] = (float)((shift ? shift[c] : 0) - factor * (mean + origin[first]));
      }
    }
#pragma omp for schedule(static)
    for (int64_t job = 0; job < n * chunks; job++) {
      const int64_t image = job / chunks, start = job % chunks * chunk, end = std::min(pixels, start + chunk);
      const float* factor = factors.data() + image * 2 * step;
      for (int64_t p = start; p < end; p++) {
        const int64_t place = (image * pixels + p) * channels;
        for (int64_t c = 0; c < channels; c += L) {
          const int size = (int)std::min<int64_t>(L, channels - c);
          const float* at = x + place + c;
          vec value = (size == L ? load(at) : load_part(at, size)) * load(factor + c) + load(factor + step + c);
          if (activate) value = silu(value);
          if (size == L) store(y + place + c, value);
          else store_part(y + place + c, value, size);
        }
      }
    }
  }
  return 0;
}

}  // extern "C"
