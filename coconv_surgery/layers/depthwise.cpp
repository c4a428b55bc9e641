// Depthwise 3×3 convolution in which each level of channels has a dilation of its own, in one pass: single precision, on
// the CPU, NCHW and channels_last. Kernels are (C, 1, 3, 3); level k is of splits[k] channels, dilations[k], paddings[k].

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

namespace {

using at::IntArrayRef;
using at::MemoryFormat;
using at::Tensor;

struct Size {
  int64_t height, width;
};

struct Level {
  int64_t first, last, dilation, padding;  // channels [first, last)
};

std::vector<Level> read_levels(IntArrayRef splits, IntArrayRef dilations, IntArrayRef paddings) {
  std::vector<Level> levels;
  int64_t first = 0;
  for (size_t k = 0; k < splits.size(); ++k) {
    levels.push_back({first, first + splits[k], dilations[k], paddings[k]});
    first += splits[k];
  }
  return levels;
}

bool is_channels_last(const Tensor& map) {
  return !map.is_contiguous() && map.is_contiguous(MemoryFormat::ChannelsLast);
}

Tensor empty_like_map(const Tensor& map, Size size) {
  const auto format = is_channels_last(map) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return at::empty({map.size(0), map.size(1), size.height, size.width}, map.options(), format);
}

Size size_of(const Tensor& map) {
  return {map.size(2), map.size(3)};
}

std::vector<Level> by_channel(const std::vector<Level>& levels) {
  std::vector<Level> found;
  for (const Level& level : levels)
    for (int64_t channel = level.first; channel < level.last; ++channel)
      found.push_back({channel, channel + 1, level.dilation, level.padding});
  return found;
}

// ---- NCHW: every channel is copied into a padded plane, so that no tap looks beyond an edge. ----

// Columns lie by their remainder modulo `step`, so that a strided kernel reads neighbours.
struct Plane {
  std::vector<float> numbers;
  int64_t height, width, step;

  float* row(int64_t number) {
    return numbers.data() + number * step * width;
  }

  int64_t column(int64_t number) const {
    return number % step * width + number / step;
  }

  // Source pixel (y, x) goes to (offset + y * spread, offset + x * spread); the rest is zero.
  void fill(const float* source, Size size, int64_t offset, int64_t spread, Size padded, int64_t step_) {
    height = padded.height, step = step_, width = (padded.width + step - 1) / step;
    numbers.assign(height * step * width, 0.0f);
    for (int64_t y = 0; y < size.height && offset + y * spread < height; ++y) {
      float* target = row(offset + y * spread);
      const float* line = source + y * size.width;
      const int64_t pixels = std::min(size.width, (padded.width - offset + spread - 1) / spread);
      if (step == 1) {
        for (int64_t x = 0; x < pixels; ++x) target[offset + x * spread] = line[x];
        continue;
      }
      for (int64_t phase = 0; phase < step; ++phase) {  // spread is 1
        const int64_t first = (phase - offset % step + step) % step;
        float* column = target + phase * width + (first + offset) / step;
        for (int64_t x = first, at = 0; x < pixels; x += step, ++at) column[at] = line[x];
      }
    }
  }
};

void correlate(Plane& plane, const float* kernel, float bias, float* output, Size size, int64_t dilation) {
  const float k0 = kernel[0], k1 = kernel[1], k2 = kernel[2], k3 = kernel[3], k4 = kernel[4], k5 = kernel[5],
              k6 = kernel[6], k7 = kernel[7], k8 = kernel[8];
  const int64_t second = plane.column(dilation), third = plane.column(2 * dilation);
  for (int64_t y = 0; y < size.height; ++y) {
    const float* a = plane.row(y * plane.step);
    const float* b = plane.row(y * plane.step + dilation);
    const float* c = plane.row(y * plane.step + 2 * dilation);
    float* line = output + y * size.width;
#pragma omp simd
    for (int64_t x = 0; x < size.width; ++x)
      line[x] = bias + k0 * a[x] + k1 * a[x + second] + k2 * a[x + third] + k3 * b[x] + k4 * b[x + second] +
          k5 * b[x + third] + k6 * c[x] + k7 * c[x + second] + k8 * c[x + third];
  }
}

void correlate_gradient(Plane& plane, const float* gradient, Size size, int64_t dilation, std::array<double, 9>& sums) {
  const int64_t second = plane.column(dilation), third = plane.column(2 * dilation);
  for (int64_t y = 0; y < size.height; ++y) {
    const float* g = gradient + y * size.width;
    for (int64_t tap = 0; tap < 3; ++tap) {
      const float* a = plane.row(y * plane.step + tap * dilation);
      float left = 0, centre = 0, right = 0;
#pragma omp simd reduction(+ : left, centre, right)
      for (int64_t x = 0; x < size.width; ++x) {
        left += g[x] * a[x];
        centre += g[x] * a[x + second];
        right += g[x] * a[x + third];
      }
      sums[3 * tap] += left, sums[3 * tap + 1] += centre, sums[3 * tap + 2] += right;
    }
  }
}

// ---- channels_last: as many neighbouring channels of a level at a time as a register holds. ----

template <int lanes>
struct Lanes {
  typedef float type __attribute__((vector_size(4 * lanes), aligned(4)));
};

template <int lanes>
using Vector = typename Lanes<lanes>::type;

template <int lanes>
Vector<lanes> load(const float* numbers) {
  return *reinterpret_cast<const Vector<lanes>*>(numbers);
}

template <int lanes>
void store(float* numbers, Vector<lanes> vector) {
  *reinterpret_cast<Vector<lanes>*>(numbers) = vector;
}

// Nine taps and four sums of this width stay in registers.
#ifdef __AVX512F__
constexpr int WIDEST = 16;
#else
constexpr int WIDEST = 8;
#endif

// Channels [first, first + lanes) of a level, of which those before `own` belong to another piece as well: a level whose
// channels no width divides ends in a piece that overlaps.
struct Piece {
  int64_t first, own, lanes, dilation, padding;
};

std::vector<Piece> pieces(const std::vector<Level>& levels) {
  std::vector<Piece> found;
  for (const Level& level : levels) {
    int64_t lanes = WIDEST;
    while (lanes > level.last - level.first) lanes = lanes == 4 ? 1 : lanes / 2;
    for (int64_t own = level.first; own < level.last; own += lanes)
      found.push_back({std::min(own, level.last - lanes), own, lanes, level.dilation, level.padding});
  }
  return found;
}

template <typename Work>
void in_lanes(const Piece& piece, Work work) {
  switch (piece.lanes) {
    case 16: return work(std::integral_constant<int, 16>());
    case 8: return work(std::integral_constant<int, 8>());
    case 4: return work(std::integral_constant<int, 4>());
    default: return work(std::integral_constant<int, 1>());
  }
}

// One row of the output. `rows` are the three that it reads, or null beyond an edge; taps lie at step * x + dilation * k -
// padding.
template <int lanes>
void correlate_row(
    const std::array<const float*, 3>& rows, int64_t width, int64_t channels, const float* kernel, const float* bias,
    float* output, int64_t output_width, int64_t step, int64_t dilation, int64_t padding) {
  const Vector<lanes> start = bias == nullptr ? Vector<lanes>{} : load<lanes>(bias);
  Vector<lanes> taps[9];
  for (int64_t tap = 0; tap < 9; ++tap) taps[tap] = load<lanes>(kernel + tap * channels);
  const bool whole = rows[0] != nullptr && rows[1] != nullptr && rows[2] != nullptr;
  for (int64_t x = 0; x < output_width; ++x) {
    const int64_t left = step * x - padding;
    Vector<lanes> sum = start;
    if (whole && left >= 0 && left + 2 * dilation < width) {
      const int64_t first = left * channels, apart = dilation * channels;
      for (int64_t row = 0; row < 3; ++row) {
        const float* numbers = rows[row] + first;
        sum += taps[3 * row] * load<lanes>(numbers);
        sum += taps[3 * row + 1] * load<lanes>(numbers + apart);
        sum += taps[3 * row + 2] * load<lanes>(numbers + 2 * apart);
      }
    } else {
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t column = left + tap % 3 * dilation;
        if (rows[tap / 3] != nullptr && column >= 0 && column < width)
          sum += taps[tap] * load<lanes>(rows[tap / 3] + column * channels);
      }
    }
    store<lanes>(output + x * channels, sum);
  }
}

// One row of the gradient of a strided convolution's input: the taps of which a multiple of the stride is left.
template <int lanes>
void spread_row(
    const std::array<const float*, 3>& rows, int64_t width, int64_t channels, const float* kernel, float* output,
    int64_t output_width, int64_t step, int64_t dilation, int64_t padding) {
  for (int64_t x = 0; x < output_width; ++x) {
    Vector<lanes> sum{};
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t column = x + padding - tap % 3 * dilation;
      if (rows[tap / 3] == nullptr || column < 0 || column % step != 0 || column / step >= width) continue;
      sum += load<lanes>(kernel + tap * channels) * load<lanes>(rows[tap / 3] + column / step * channels);
    }
    store<lanes>(output + x * channels, sum);
  }
}

// (C, 1, 3, 3) as (9, C), the taps in reverse order if asked for.
Tensor by_tap(const Tensor& weight, bool reversed) {
  const Tensor taps = weight.reshape({weight.size(0), 9}).t();
  return (reversed ? taps.flip(0) : taps).contiguous();
}

// ---- The operators. ----

// A correlation with stride `step`, or with the spread-out input of one.
Tensor convolve(
    const Tensor& input, const Tensor& weight, const Tensor* bias, const std::vector<Level>& levels, Size size,
    int64_t step, int64_t spread, bool reversed) {
  const int64_t images = input.size(0), channels = input.size(1);
  const Size from = size_of(input);
  Tensor output = empty_like_map(input, size);
  const float* source = input.const_data_ptr<float>();
  const float* biases = bias == nullptr ? nullptr : bias->const_data_ptr<float>();
  float* target = output.mutable_data_ptr<float>();
  const Tensor taps = is_channels_last(input) ? by_tap(weight, reversed)
                                              : (reversed ? weight.reshape({channels, 9}).flip(1) : weight).contiguous();
  const float* kernels = taps.const_data_ptr<float>();
  if (!is_channels_last(input)) {
    const auto of = by_channel(levels);
    at::parallel_for(0, images * channels, 1, [&](int64_t begin, int64_t end) {
      Plane plane;
      for (int64_t map = begin; map < end; ++map) {
        const int64_t channel = map % channels, dilation = of[channel].dilation;
        const int64_t offset = reversed ? 2 * dilation - of[channel].padding : of[channel].padding;
        const Size padded{(size.height - 1) * step + 2 * dilation + 1, (size.width - 1) * step + 2 * dilation + 1};
        plane.fill(source + map * from.height * from.width, from, offset, spread, padded, step);
        const float number = biases == nullptr ? 0.0f : biases[channel];
        correlate(plane, kernels + 9 * channel, number, target + map * size.height * size.width, size, dilation);
      }
    });
    return output;
  }
  const auto parts = pieces(levels);
  at::parallel_for(0, images * size.height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t y = line % size.height;
      const float* image = source + line / size.height * from.height * from.width * channels;
      for (const Piece& part : parts) {
        const int64_t padding = reversed ? 2 * part.dilation - part.padding : part.padding;
        std::array<const float*, 3> rows;
        for (int64_t tap = 0; tap < 3; ++tap) {
          const int64_t row = spread == 1 ? step * y - padding + tap * part.dilation : y + part.padding - tap * part.dilation;
          const bool there = row >= 0 && row % spread == 0 && row / spread < from.height;
          rows[tap] = there ? image + row / spread * from.width * channels + part.first : nullptr;
        }
        const float* kernel = kernels + part.first;
        float* to = target + line * size.width * channels + part.first;
        in_lanes(part, [&](auto lanes) {
          if (spread == 1)
            correlate_row<lanes.value>(
                rows, from.width, channels, kernel, biases == nullptr ? nullptr : biases + part.first, to, size.width,
                step, part.dilation, padding);
          else
            spread_row<lanes.value>(
                rows, from.width, channels, kernel, to, size.width, spread, part.dilation, part.padding);
        });
      }
    }
  });
  return output;
}

Tensor forward(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef splits,
    IntArrayRef dilations, IntArrayRef paddings, int64_t stride) {
  const auto levels = read_levels(splits, dilations, paddings);
  const int64_t reach = 2 * (paddings[0] - dilations[0]) - 1;
  const Size size{(input.size(2) + reach) / stride + 1, (input.size(3) + reach) / stride + 1};
  return convolve(input, weight, bias ? &*bias : nullptr, levels, size, stride, 1, false);
}

Tensor backward_input(
    const Tensor& gradient, const Tensor& weight, IntArrayRef splits, IntArrayRef dilations, IntArrayRef paddings,
    int64_t stride, int64_t height, int64_t width) {
  const auto levels = read_levels(splits, dilations, paddings);
  // In channels_last a strided one goes by what each pixel is read by, so that its taps stay in their order.
  const bool reversed = stride == 1 || !is_channels_last(gradient);
  return convolve(gradient, weight, nullptr, levels, {height, width}, 1, stride, reversed);
}

Tensor backward_weight(
    const Tensor& gradient, const Tensor& input, IntArrayRef splits, IntArrayRef dilations, IntArrayRef paddings,
    int64_t stride) {
  const auto levels = read_levels(splits, dilations, paddings);
  const int64_t images = input.size(0), channels = input.size(1);
  const Size from = size_of(input), size = size_of(gradient);
  const float* source = input.const_data_ptr<float>();
  const float* gradients = gradient.const_data_ptr<float>();
  Tensor result = at::empty({channels, 1, 3, 3}, input.options());
  float* target = result.mutable_data_ptr<float>();
  if (!is_channels_last(input)) {
    const auto of = by_channel(levels);
    at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
      Plane plane;
      for (int64_t channel = begin; channel < end; ++channel) {
        const int64_t dilation = of[channel].dilation;
        const Size padded{(size.height - 1) * stride + 2 * dilation + 1, (size.width - 1) * stride + 2 * dilation + 1};
        std::array<double, 9> sums{};
        for (int64_t map = channel; map < images * channels; map += channels) {
          plane.fill(source + map * from.height * from.width, from, of[channel].padding, 1, padded, stride);
          correlate_gradient(plane, gradients + map * size.height * size.width, size, dilation, sums);
        }
        std::copy(sums.begin(), sums.end(), target + 9 * channel);
      }
    });
    return result;
  }
  const auto parts = pieces(levels);
  at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const Piece& part = parts[number];
      in_lanes(part, [&](auto lanes) {
        Vector<lanes.value> sums[9] = {};
        for (int64_t line = 0; line < images * size.height; ++line) {
          const float* g = gradients + line * size.width * channels + part.first;
          const float* image = source + line / size.height * from.height * from.width * channels + part.first;
          for (int64_t tap = 0; tap < 9; ++tap) {
            const int64_t row = line % size.height * stride - part.padding + tap / 3 * part.dilation;
            if (row < 0 || row >= from.height) continue;
            const int64_t shift = tap % 3 * part.dilation - part.padding;
            const int64_t first = shift >= 0 ? 0 : (-shift + stride - 1) / stride;
            const int64_t last = std::min(size.width, (from.width - shift + stride - 1) / stride);
            const float* line_of = image + row * from.width * channels;
            Vector<lanes.value> sum{};
            for (int64_t x = first; x < last; ++x)
              sum += load<lanes.value>(g + x * channels) * load<lanes.value>(line_of + (stride * x + shift) * channels);
            sums[tap] += sum;
          }
        }
        for (int64_t tap = 0; tap < 9; ++tap)
          for (int64_t channel = part.own; channel < part.first + lanes.value; ++channel)
            target[9 * channel + tap] = reinterpret_cast<const float*>(&sums[tap])[channel - part.first];
      });
    }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY(coconv_surgery, library) {
  library.def("depthwise(Tensor input, Tensor weight, Tensor? bias, int[] splits, int[] dilations, int[] paddings, "
              "int stride) -> Tensor");
  library.def("depthwise_input(Tensor gradient, Tensor weight, int[] splits, int[] dilations, int[] paddings, "
              "int stride, int height, int width) -> Tensor");
  library.def("depthwise_weight(Tensor gradient, Tensor input, int[] splits, int[] dilations, int[] paddings, "
              "int stride) -> Tensor");
  library.impl("depthwise", c10::DispatchKey::CPU, TORCH_FN(forward));
  library.impl("depthwise_input", c10::DispatchKey::CPU, TORCH_FN(backward_input));
  library.impl("depthwise_weight", c10::DispatchKey::CPU, TORCH_FN(backward_weight));
}
