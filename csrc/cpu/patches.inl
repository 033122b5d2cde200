// The images as blocks of patches, normalised, so that the first convolution is a product; and the
// gradient back:
//   out[g, p, n, k] = scale[k] x[16 g + n, offsets[p, k]] + shift[k], 0 where the offset is -1
//   grad[b, e] = sum over j of scale[e] patches[b's group, offsets[j, e]], in fp32
// x: fp32 [batch, ...], an image `image_stride` elements apart, offsets into it int32 [pixels, size
// filled up to whole blocks]; out, patches: dtype [groups, pixels, size / 32, 16, 32]; grad: fp32
// [batch, elements]; offsets of the gradient: int32 [terms, elements] into image 0 of a group's
// patches, -1 for none; scale and shift: fp32 [size] and, of the gradient, [elements].
template <typename T>
static void patches_as(T* out, const float* x, const int32_t* offsets, const float* scale,
                       const float* shift, int64_t batch, int64_t pixels, int64_t size,
                       int64_t image_stride, int threads) {
  const int64_t groups = (batch + rows - 1) / rows, blocks = size / columns_of_block;
  parallel_for(groups * pixels, threads, [&](int64_t task) {
    const int64_t g = task / pixels, p = task % pixels;
    for (int64_t k = 0; k < size; k += W) {
      I offset;
      std::memcpy(&offset, offsets + p * size + k, sizeof offset);
      const F by = load(scale + k), plus = load(shift + k);
      T* block = out + (task * blocks + k / columns_of_block) * block_size + k % columns_of_block;
      for (int64_t n = 0; n < rows; ++n) {
        const int64_t b = g * rows + n;
        F v = {};
        if (b < batch) v = offset < 0 ? v : fma(gather(x + b * image_stride, offset), by, plus);
        put(block + n * columns_of_block, v);
      }
    }
  });
}

template <typename T>
static void patches_backward_as(float* grad, const T* patches, const int32_t* offsets,
                                int64_t batch, int64_t elements, int64_t terms, int64_t image_size,
                                const float* scale, int threads) {
  parallel_for(batch, threads, [&](int64_t b) {
    const T* image = patches + b / rows * image_size * rows + b % rows * columns_of_block;
    for (int64_t e = 0; e < elements; e += W) {
      F sum = {};
      for (int64_t j = 0; j < terms; ++j) {
        I offset = I{} - 1;
        const int64_t left = elements - e < W ? elements - e : W;
        std::memcpy(&offset, offsets + j * elements + e, left * sizeof(int32_t));
        sum += gather(image, offset);
      }
      store_head(grad + b * elements + e, sum * load_head(scale + e, elements - e), elements - e);
    }
  });
}

static void patches(void* out, const float* x, const int32_t* offsets, const float* scale,
                    const float* shift, int64_t batch, int64_t pixels, int64_t size,
                    int64_t image_stride, DType dtype, int threads) noexcept {
  const auto run = [&](auto* type) {
    patches_as(static_cast<decltype(type)>(out), x, offsets, scale, shift, batch, pixels, size,
               image_stride, threads);
  };
  dtype == DType::bf16 ? run(static_cast<BF16*>(nullptr)) : run(static_cast<float*>(nullptr));
}

static void patches_backward(float* grad, const void* patches, const int32_t* offsets,
                             int64_t batch, int64_t elements, int64_t terms, int64_t image_size,
                             const float* scale, DType dtype, int threads) noexcept {
  const auto run = [&](auto* type) {
    patches_backward_as(grad, static_cast<decltype(type)>(patches), offsets, batch, elements, terms,
                        image_size, scale, threads);
  };
  dtype == DType::bf16 ? run(static_cast<const BF16*>(nullptr))
                       : run(static_cast<const float*>(nullptr));
}
