// Backward passes of training on a CPU, over maps of bfloat16 in channels_last order, that is, rows
// [rows, channels]. mecq_cli/loops.py compiles them and says what they compute.

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <omp.h>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t TILE = 256;   // rows whose sums are float32; those of tiles are double
constexpr int64_t BLOCK = 4096; // values of a flat tensor, likewise

// Written out: of branches on the values the compiler makes jumps, which cost ten times as much.
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

inline Floats all(float value) { return value - Floats{}; }

template <typename T> inline T load(const void *from) {
    T result;
    std::memcpy(&result, from, sizeof(T));
    return result;
}

template <typename T> inline T load(const void *from, int64_t bytes) {
    T result = {};
    std::memcpy(&result, from, bytes);
    return result;
}

inline Floats widened(Halves values) {
    return reinterpret_cast<Floats>(__builtin_convertvector(values, Words) << 16);
}

inline Halves narrowed(Floats values) { // to the nearest, ties to even
    const Words bits = reinterpret_cast<Words>(values);
    return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
}

inline Floats kept(Ints mask, Floats values) {
    return reinterpret_cast<Floats>(mask & reinterpret_cast<Ints>(values));
}

// NaN stays NaN.
inline Floats between(Floats v, Floats low, Floats high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

// Of values that a grid has clipped: far below 2^22, or NaN.
inline Floats rounded(Floats v) {
    const float magic = 12582912.0f;
    return (v + magic) - magic;
}

// The odd integer next to v, which clipped is made of, and of its sign.
inline Floats nearest_odd(Floats v, Floats clipped) {
    const Floats half = (clipped < 0.0f ? -clipped : clipped) * 0.5f;
    const Floats floored = __builtin_convertvector(__builtin_convertvector(half, Ints), Floats);
    const Floats odd = 2.0f * floored + all(1.0f) + (clipped - clipped);
    return v >= 0.0f ? odd : -odd;
}

// A grid in units of its step; of odd integers where it has no zero.
struct Grid {
    Floats low, high, shift;
    bool soft, odd;

    Grid() = default;
    Grid(float low, float high, float shift, int soft, int odd)
        : low(all(low)), high(all(high)), shift(all(shift)), soft(soft != 0), odd(odd != 0) {}

    // Of the gradient to x, in units too, what the rounding lets pass, and what the step gets.
    inline Floats pass(Floats upstream, Floats x, Floats &step) const {
        const Floats v = x + shift, clipped = between(v, low, high);
        Floats inside;
        if (soft) { // less and less across the ends, over the distance of two integers
            const Floats under = v - low, over = high - v;
            const Floats nearer = (under < over ? under : over) * all(odd ? 0.5f : 1.0f);
            inside = upstream * between(nearer + all(0.5f), all(0.0f), all(1.0f));
        } else {
            inside = kept(clipped == v, upstream);
        }
        step = upstream * (odd ? nearest_odd(v, clipped) : rounded(clipped)) - inside * v;
        return inside;
    }
};

struct Channels { // of LANES channels
    Floats scale, offset, inverse, floor, ceiling;
    Grid grid;

    // What of the gradient passes, and what the step gets of it.
    inline void pass(Floats upstream, Floats value, Floats &passed, Floats &step) const {
        const Floats out = value * scale + offset, bounded = between(out, floor, ceiling);
        passed = kept(bounded == out, grid.pass(upstream, bounded * inverse, step));
    }
};

struct Job {
    const uint16_t *grad, *y;
    uint16_t *of_y;
    const float *scale, *offset, *mean;
    float inverse, floor, ceiling;
    Grid grid;
    int64_t channels;

    inline Channels at(int64_t c, int64_t n) const {
        return {load<Floats>(scale + c, 4 * n), load<Floats>(offset + c, 4 * n), all(inverse),
                all(floor), all(ceiling), grid};
    }
};

// LANES values, or only n of them.
template <bool WHOLE> inline Halves halves(const uint16_t *from, int64_t n) {
    return WHOLE ? load<Halves>(from) : load<Halves>(from, 2 * n);
}

// PARTS * LANES channels from c on, or only n of them.
template <int PARTS, bool WHOLE>
inline void sum_tile(const Job &job, int64_t first, int64_t rows, int64_t c, int64_t n,
                     double *of_bias, double *of_weight, double *of_step) {
    Channels line[PARTS];
    Floats mean[PARTS], bias[PARTS] = {}, weight[PARTS] = {}, step[PARTS] = {};
    for (int p = 0; p < PARTS; ++p) {
        line[p] = job.at(c + p * LANES, WHOLE ? LANES : n);
        mean[p] = load<Floats>(job.mean + c + p * LANES, 4 * (WHOLE ? LANES : n));
    }
    for (int64_t row = first; row < first + rows; ++row) {
        for (int p = 0; p < PARTS; ++p) {
            const int64_t at = row * job.channels + c + p * LANES;
            const Halves g = halves<WHOLE>(job.grad + at, n), x = halves<WHOLE>(job.y + at, n);
            Floats passed, of_this;
            line[p].pass(widened(g), widened(x), passed, of_this);
            step[p] += of_this;
            bias[p] += passed;
            weight[p] += passed * (widened(x) - mean[p]);
        }
    }
    for (int p = 0; p < PARTS; ++p) {
        for (int64_t i = 0; i < (WHOLE ? LANES : n); ++i) {
            of_bias[c + p * LANES + i] += bias[p][i];
            of_weight[c + p * LANES + i] += weight[p][i];
            *of_step += step[p][i];
        }
    }
}

template <int PARTS, bool WHOLE>
inline void write_tile(const Job &job, int64_t first, int64_t rows, int64_t c, int64_t n,
                       const float *slope, const float *constant) {
    Channels line[PARTS];
    Floats along[PARTS], plus[PARTS];
    for (int p = 0; p < PARTS; ++p) {
        line[p] = job.at(c + p * LANES, WHOLE ? LANES : n);
        along[p] = load<Floats>(slope + c + p * LANES, 4 * (WHOLE ? LANES : n));
        plus[p] = load<Floats>(constant + c + p * LANES, 4 * (WHOLE ? LANES : n));
    }
    for (int64_t row = first; row < first + rows; ++row) {
        for (int p = 0; p < PARTS; ++p) {
            const int64_t at = row * job.channels + c + p * LANES;
            const Halves g = halves<WHOLE>(job.grad + at, n), x = halves<WHOLE>(job.y + at, n);
            Floats passed, unused;
            line[p].pass(widened(g), widened(x), passed, unused);
            const Halves result =
                narrowed(passed * line[p].scale + widened(x) * along[p] + plus[p]);
            std::memcpy(job.of_y + at, &result, WHOLE ? sizeof(result) : 2 * n);
        }
    }
}

// Calls `two`, `one` and `rest` with the first channel of each chunk (and how many are left).
template <typename Two, typename One, typename Rest>
inline void each_chunk(int64_t channels, Two two, One one, Rest rest) {
    int64_t c = 0;
    for (; c + 2 * LANES <= channels; c += 2 * LANES)
        two(c);
    for (; c + LANES <= channels; c += LANES)
        one(c);
    if (c < channels)
        rest(c, channels - c);
}

// The LANES values from place i on, or only n of them.
inline Floats floats_at(const float *from, int64_t i, int64_t n) {
    return n == LANES ? load<Floats>(from + i) : load<Floats>(from + i, 4 * n);
}

inline Floats floats_at(const uint16_t *from, int64_t i, int64_t n) {
    return widened(n == LANES ? load<Halves>(from + i) : load<Halves>(from + i, 2 * n));
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

} // namespace

extern "C" void norm_round_backward(const uint16_t *grad, const uint16_t *y, uint16_t *of_y,
                                    const float *scale, const float *offset, const float *mean,
                                    const float *factor, float *of_weight, float *of_bias,
                                    float *of_step, float inverse, float floor, float ceiling,
                                    float low, float high, float shift, int soft, int odd,
                                    int64_t rows, int64_t channels, int threads) {
    const Grid grid(low, high, shift, soft, odd);
    const Job job{grad, y, of_y, scale, offset, mean, inverse, floor, ceiling, grid, channels};
    const int64_t tiles = (rows + TILE - 1) / TILE;
    const int64_t width = 2 * channels + 1 + 8; // no two threads write to one cache line
    std::vector<double> sums(threads * width, 0.0);
    std::vector<float> slope(channels), constant(channels);
#pragma omp parallel num_threads(threads)
    {
        double *bias = sums.data() + omp_get_thread_num() * width;
        double *weight = bias + channels, *step = weight + channels;
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = tile * TILE, count = smaller(rows - first, TILE);
            each_chunk(
                channels,
                [&](int64_t c) {
                    sum_tile<2, true>(job, first, count, c, LANES, bias, weight, step);
                },
                [&](int64_t c) {
                    sum_tile<1, true>(job, first, count, c, LANES, bias, weight, step);
                },
                [&](int64_t c, int64_t n) {
                    sum_tile<1, false>(job, first, count, c, n, bias, weight, step);
                });
        }
#pragma omp single
        {
            for (int thread = 1; thread < threads; ++thread)
                for (int64_t i = 0; i < 2 * channels + 1; ++i)
                    sums[i] += sums[thread * width + i];
            *of_step = static_cast<float>(sums[2 * channels]);
            for (int64_t c = 0; c < channels; ++c) {
                const double first = sums[c], second = sums[channels + c] * factor[c];
                of_bias[c] = static_cast<float>(first);
                of_weight[c] = static_cast<float>(second);
                const double along = -scale[c] * factor[c] * second / rows;
                slope[c] = static_cast<float>(along);
                constant[c] = static_cast<float>(-scale[c] * first / rows - along * mean[c]);
            }
        }
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = tile * TILE, count = smaller(rows - first, TILE);
            each_chunk(
                channels,
                [&](int64_t c) {
                    write_tile<2, true>(job, first, count, c, LANES, slope.data(), constant.data());
                },
                [&](int64_t c) {
                    write_tile<1, true>(job, first, count, c, LANES, slope.data(), constant.data());
                },
                [&](int64_t c, int64_t n) {
                    write_tile<1, false>(job, first, count, c, n, slope.data(), constant.data());
                });
        }
    }
}

extern "C" void round_backward(const uint16_t *grad, const uint16_t *x, uint16_t *of_x,
                               float *of_step, float inverse, float low, float high,
                               float shift, int soft, int odd, int64_t count, int threads) {
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
    const Grid grid(low, high, shift, soft, odd);
    double total = 0.0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t end = smaller((block + 1) * BLOCK, count);
        Floats sums = {};
        for (int64_t i = block * BLOCK; i < end; i += LANES) {
            const int64_t n = smaller(end - i, LANES);
            Floats of_this;
            const Floats units = floats_at(x, i, n) * inverse;
            const Halves result = narrowed(grid.pass(floats_at(grad, i, n), units, of_this));
            sums += of_this;
            if (n == LANES)
                std::memcpy(of_x + i, &result, sizeof(result));
            else
                std::memcpy(of_x + i, &result, 2 * n);
        }
        for (int64_t i = 0; i < LANES; ++i)
            total += sums[i];
    }
    *of_step = static_cast<float>(total);
}

namespace {

template <typename Gradient>
void weight_rows(const Gradient *grad, const float *weight, const float *steps, float *of_weight,
                 float *of_steps, float low, float high, bool mid_rise, int64_t rows,
                 int64_t length, int threads) {
    const Grid grid(low, high, 0.0f, 0, mid_rise);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const Floats step = all(steps[row]);
        const int64_t end = (row + 1) * length;
        double total = 0.0;
        for (int64_t start = row * length; start < end; start += BLOCK) {
            Floats sums = {};
            for (int64_t i = start; i < smaller(start + BLOCK, end); i += LANES) {
                const int64_t n = smaller(end - i, LANES);
                const Floats upstream = floats_at(grad, i, n), w = floats_at(weight, i, n);
                Floats of_this;
                const Floats inside = grid.pass(upstream, w / step, of_this);
                sums += of_this;
                if (n == LANES)
                    std::memcpy(of_weight + i, &inside, sizeof(inside));
                else
                    std::memcpy(of_weight + i, &inside, 4 * n);
            }
            for (int64_t i = 0; i < LANES; ++i)
                total += sums[i];
        }
        of_steps[row] = static_cast<float>(total);
    }
}

} // namespace

// `grad` is bfloat16 where `halves` says so, else float32.
extern "C" void weight_backward(const void *grad, const float *weight, const float *steps,
                                float *of_weight, float *of_steps, float low, float high,
                                int mid_rise, int halves, int64_t rows, int64_t length,
                                int threads) {
    if (halves)
        weight_rows(static_cast<const uint16_t *>(grad), weight, steps, of_weight, of_steps, low,
                    high, mid_rise, rows, length, threads);
    else
        weight_rows(static_cast<const float *>(grad), weight, steps, of_weight, of_steps, low, high,
                    mid_rise, rows, length, threads);
}

namespace {

constexpr int64_t TAPS = 8;   // of a row of a window, that are added up at once
constexpr int64_t IMAGES = 8; // whose sums are added up by one thread

// A convolution of each channel for itself, over maps [images, height, width, channels].
struct Depthwise {
    const uint16_t *grad, *x;
    uint16_t *of_x;
    const float *weight; // [taps, channels]
    int64_t channels, height, width, out_height, out_width;
    int64_t kernel[2], stride[2], padding[2], dilation[2];

    // Of a tap: where it lies, from where its window begins in the map without padding.
    inline int64_t offset(int axis, int64_t tap) const {
        return tap * dilation[axis] - padding[axis];
    }
};

// LANES channels of a map as floats, each row between zeros.
struct Plane {
    int64_t before, line;
    std::vector<Floats> values;

    Plane(int64_t height, int64_t width, int64_t before, int64_t after)
        : before(before > 0 ? before : 0), line(this->before + width + (after > 0 ? after : 0)),
          values(height * line, Floats{}) {}

    void read(const uint16_t *from, int64_t height, int64_t width, int64_t pixel, int64_t n) {
        for (int64_t y = 0; y < height; ++y)
            for (int64_t x = 0; x < width; ++x)
                row(y)[x] = floats_at(from + (y * width + x) * pixel, 0, n);
    }

    inline Floats *row(int64_t y) { return values.data() + y * line + before; }
};

// For `count` taps of one row of the windows: what the row of the result says to their weights.
template <int COUNT>
inline void sum_taps(const Floats *grad, const Floats *x, int64_t columns, int64_t stride,
                     int64_t dilation, Floats *sums) {
    Floats own[COUNT];
    for (int tap = 0; tap < COUNT; ++tap)
        own[tap] = sums[tap];
    for (int64_t column = 0; column < columns; ++column)
        for (int tap = 0; tap < COUNT; ++tap)
            own[tap] += grad[column] * x[column * stride + tap * dilation];
    for (int tap = 0; tap < COUNT; ++tap)
        sums[tap] = own[tap];
}

// What they say to every `stride`th place of a row of the map.
template <int COUNT>
inline void add_taps(const Floats *const *grads, const Floats *weights, int64_t places,
                     int64_t stride, Floats *line) {
    const Floats *from[COUNT];
    Floats own[COUNT];
    for (int tap = 0; tap < COUNT; ++tap)
        from[tap] = grads[tap], own[tap] = weights[tap];
    for (int64_t place = 0; place < places; ++place) {
        Floats sum = line[place * stride];
        for (int tap = 0; tap < COUNT; ++tap)
            sum += from[tap][place] * own[tap];
        line[place * stride] = sum;
    }
}

// Calls `taps` with a constant, of which the compiler makes registers.
template <typename Taps> inline void with_count(int64_t count, Taps taps) {
    switch (count) {
    case 1: taps(std::integral_constant<int, 1>()); break;
    case 2: taps(std::integral_constant<int, 2>()); break;
    case 3: taps(std::integral_constant<int, 3>()); break;
    case 4: taps(std::integral_constant<int, 4>()); break;
    case 5: taps(std::integral_constant<int, 5>()); break;
    case 6: taps(std::integral_constant<int, 6>()); break;
    case 7: taps(std::integral_constant<int, 7>()); break;
    case TAPS: taps(std::integral_constant<int, TAPS>()); break;
    }
}

// What one thread needs; of LANES channels, or of only n of them, from c on.
class Chunk {
  public:
    explicit Chunk(const Depthwise &job)
        : job(job), x(job.height, job.width, job.padding[1],
                      (job.out_width - 1) * job.stride[1] + job.offset(1, job.kernel[1] - 1) -
                          (job.width - 1)),
          grad(job.out_height, job.out_width, job.offset(1, job.kernel[1]) / job.stride[1] + 1,
               (job.width - 1 + job.padding[1]) / job.stride[1] + 1 - job.out_width),
          line(job.width), weights(job.kernel[0] * job.kernel[1]), sums(weights.size()) {}

    // The gradient of an image's map, and its part of that of the weights: `sums`.
    void run(int64_t image, int64_t c, int64_t n) {
        const int64_t pixel = job.channels;
        const int64_t size = job.height * job.width, out_size = job.out_height * job.out_width;
        x.read(job.x + image * size * pixel + c, job.height, job.width, pixel, n);
        grad.read(job.grad + image * out_size * pixel + c, job.out_height, job.out_width, pixel, n);
        for (size_t tap = 0; tap < weights.size(); ++tap)
            weights[tap] = floats_at(job.weight + tap * pixel + c, 0, n), sums[tap] = Floats{};
        of_weight();
        of_map(job.of_x + image * size * pixel + c, n);
    }

    const Depthwise &job;
    Plane x, grad;
    std::vector<Floats> line, weights, sums;

  private:
    void of_weight() {
        for (int64_t row = 0; row < job.out_height; ++row) {
            for (int64_t ky = 0; ky < job.kernel[0]; ++ky) {
                const int64_t y = row * job.stride[0] + job.offset(0, ky);
                if (y < 0 || y >= job.height)
                    continue;
                for (int64_t kx = 0; kx < job.kernel[1]; kx += TAPS)
                    with_count(smaller(TAPS, job.kernel[1] - kx), [&](auto count) {
                        sum_taps<count()>(grad.row(row), x.row(y) + job.offset(1, kx),
                                          job.out_width, job.stride[1], job.dilation[1],
                                          sums.data() + ky * job.kernel[1] + kx);
                    });
            }
        }
    }

    void of_map(uint16_t *of_x, int64_t n) {
        for (int64_t y = 0; y < job.height; ++y) {
            for (Floats &value : line)
                value = Floats{};
            for (int64_t ky = 0; ky < job.kernel[0]; ++ky) {
                const int64_t place = y - job.offset(0, ky), row = place / job.stride[0];
                if (place >= 0 && place % job.stride[0] == 0 && row < job.out_height)
                    add_row(grad.row(row), weights.data() + ky * job.kernel[1]);
            }
            for (int64_t column = 0; column < job.width; ++column) {
                const Halves result = narrowed(line[column]);
                std::memcpy(of_x + (y * job.width + column) * job.channels, &result, 2 * n);
            }
        }
    }

    // Places that the same taps reach go together.
    void add_row(const Floats *upstream, const Floats *row_weights) {
        const int64_t stride = job.stride[1];
        for (int64_t first = 0; first < smaller(stride, job.width); ++first) {
            const Floats *from[TAPS];
            Floats factors[TAPS];
            int64_t found = 0;
            const auto flush = [&] {
                with_count(found, [&](auto count) {
                    add_taps<count()>(from, factors, (job.width - 1 - first) / stride + 1, stride,
                                      line.data() + first);
                });
                found = 0;
            };
            for (int64_t kx = 0; kx < job.kernel[1]; ++kx) {
                const int64_t place = first - job.offset(1, kx);
                if (place % stride != 0)
                    continue;
                from[found] = upstream + place / stride;
                factors[found] = row_weights[kx];
                if (++found == TAPS)
                    flush();
            }
            flush();
        }
    }
};

} // namespace

// `sizes`: channels, height and width of the map, of the result; kernel, stride, padding, dilation.
// Returns 0 where there is not enough memory.
extern "C" int depthwise_backward(const uint16_t *grad, const uint16_t *x, const float *weight,
                                  uint16_t *of_x, float *of_weight, const int64_t *sizes,
                                  int64_t images, int threads) {
    Depthwise job{grad, x, of_x, weight, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    for (int axis = 0; axis < 2; ++axis) {
        job.kernel[axis] = sizes[5 + axis], job.stride[axis] = sizes[7 + axis];
        job.padding[axis] = sizes[9 + axis], job.dilation[axis] = sizes[11 + axis];
    }
    const int64_t chunks = (job.channels + LANES - 1) / LANES, width = chunks * LANES;
    const int64_t blocks = (images + IMAGES - 1) / IMAGES, taps = job.kernel[0] * job.kernel[1];
    std::vector<double> sums;
    try {
        sums.resize(blocks * taps * width, 0.0);
    } catch (const std::bad_alloc &) {
        return 0;
    }
    int enough = 1;
#pragma omp parallel num_threads(threads)
    {
        std::unique_ptr<Chunk> chunk; // made by the thread that uses it, of memory near to it
        try {
            chunk = std::make_unique<Chunk>(job);
        } catch (const std::bad_alloc &) { // which may not leave the parallel part
#pragma omp atomic write
            enough = 0;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t task = 0; task < enough * blocks * chunks; ++task) {
            const int64_t block = task / chunks, c = task % chunks * LANES;
            const int64_t n = smaller(job.channels - c, LANES);
            double *total = sums.data() + block * taps * width + c;
            for (int64_t image = block * IMAGES; image < smaller(images, (block + 1) * IMAGES);
                 ++image) {
                chunk->run(image, c, n);
                for (int64_t tap = 0; tap < taps; ++tap)
                    for (int64_t i = 0; i < n; ++i)
                        total[tap * width + i] += chunk->sums[tap][i];
            }
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < job.channels; ++c) {
            for (int64_t tap = 0; tap < taps; ++tap) {
                double total = 0.0;
                for (int64_t block = 0; block < blocks; ++block)
                    total += sums[(block * taps + tap) * width + c];
                of_weight[c * taps + tap] = static_cast<float>(total);
            }
        }
    }
    return enough;
}
