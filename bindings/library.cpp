// Every op of the engine, in every build: the table of contents. Shapes and meaning: biflow/ops/<op>.py.
#include "library.h"

#include <torch/csrc/stable/tensor.h>

STABLE_TORCH_LIBRARY(BIFLOW_LIBRARY, m) {
  // which CPU kernels run: the instruction set in use; force_cpu_isa is for tests
  m.def("cpu_isa() -> str");
  m.def("force_cpu_isa(str name) -> ()");

  // one flow block: weights in the order of csrc/block.h; the exact sequential inverse
  m.def(
      "packed_block_size(Tensor[] weights, *, int tokens, int channels, int width, int layers, int head_dim, "
      "int mlp_hidden, str norm, str gate, bool qk_norm, bool rope, bool pos_embed, bool start_token, "
      "bool shift_only, str precision) -> int");
  m.def(
      "pack_block_(Tensor[] weights, Tensor(a!) packed, *, int tokens, int channels, int width, int layers, "
      "int head_dim, int mlp_hidden, str norm, str gate, bool qk_norm, bool rope, bool pos_embed, bool start_token, "
      "bool shift_only, str precision) -> ()");
  m.def(
      "decode_block(Tensor z, Tensor packed, Tensor? added, Tensor? prefix, Tensor? null_added, Tensor? null_prefix, "
      "*, "
      "int width, int layers, int head_dim, int mlp_hidden, str norm, str gate, bool qk_norm, bool rope, "
      "bool pos_embed, bool start_token, bool shift_only, str precision, str layout, str scale, str clip, float "
      "clip_value, "
      "str clip_on, bool flip, float guidance, str guide, bool anneal, float attn_temp) -> Tensor");
  m.def(
      "decode_block_(Tensor z, Tensor packed, Tensor? added, Tensor? prefix, Tensor? null_added, Tensor? null_prefix, "
      "Tensor(a!) out, *, int width, int layers, int head_dim, int mlp_hidden, str norm, str gate, bool qk_norm, "
      "bool rope, bool pos_embed, bool start_token, bool shift_only, str precision, str layout, str scale, str clip, "
      "float clip_value, str clip_on, bool flip, float guidance, str guide, bool anneal, float attn_temp, "
      "int[] plan=[], Tensor(b!)? workspace=None, int phases=-1) -> ()");
  // CUDA: plan as used, words of workspace, where its buffers lie: csrc/decode_block.h, bindings/decode_block_cuda.cpp
  m.def(
      "decode_block_buffers(*, int batch, bool guided, int prefix_tokens, int tokens, int channels, int width, "
      "int layers, int head_dim, int mlp_hidden, bool start_token, bool shift_only, str precision, int[] plan=[], "
      "int[] machine=[]) -> int[]");

  // raw parameters of the tokens start <= n < stop (block order) in one parallel pass; cache: keys and values
  m.def(
      "block_params_(Tensor x, Tensor packed, Tensor? added, Tensor? prefix, Tensor? null_added, Tensor? null_prefix, "
      "Tensor(a!) raw, Tensor(b!)? cache, *, int start, int stop, int width, int layers, int head_dim, int mlp_hidden, "
      "str norm, str gate, bool qk_norm, bool rope, bool pos_embed, bool start_token, bool shift_only, str precision, "
      "str layout, bool flip, float guidance, str guide, bool anneal, float attn_temp) -> ()");
  m.def(
      "block_cache_size(*, int prefix_tokens, int tokens, int width, int layers, int head_dim, str precision) -> int");

  // one fixed-point step on the tokens start <= n < stop (block order): x = z sigma + b; moved (2, B): how far
  m.def(
      "jacobi_update_(Tensor(a!) x, Tensor z, Tensor raw, Tensor(b!) moved, *, int start, int stop, bool shift_only, "
      "str layout, str scale, str clip, float clip_value, str clip_on, bool flip) -> ()");

  // a hash of all bytes of the weights: whether they must be packed again
  m.def("weights_fingerprint(Tensor[] weights) -> int");

  // affine coupling with log-determinant; options as in biflow/ops/affine.py, clip "none" | "hard" | "tanh"
  m.def(
      "affine_encode(Tensor x, Tensor params, str layout, str scale, str clip, float clip_value, str clip_on, "
      "bool causal, bool flip, Tensor? mask) -> (Tensor z, Tensor logdet)");
  m.def(
      "affine_decode(Tensor z, Tensor params, str layout, str scale, str clip, float clip_value, str clip_on, "
      "bool causal, bool flip, Tensor? mask, bool return_logdet) -> (Tensor x, Tensor logdet)");
  m.def(
      "affine_encode_backward(Tensor grad_z, Tensor? grad_logdet, Tensor x, Tensor params, str layout, str scale, "
      "str clip, float clip_value, str clip_on, bool causal, bool flip, Tensor? mask) "
      "-> (Tensor grad_x, Tensor grad_params)");
  m.def(
      "affine_decode_backward(Tensor grad_x, Tensor? grad_logdet, Tensor z, Tensor params, str layout, str scale, "
      "str clip, float clip_value, str clip_on, bool causal, bool flip, Tensor? mask) "
      "-> (Tensor grad_z, Tensor grad_params)");

  // errors of norm(h) head^T against target, summed over a sample: CUDA in Triton, CPU in chunks of torch's functions
  m.def(
      "alignment_error(Tensor h, Tensor target, Tensor norm_weight, Tensor? norm_bias, Tensor head_weight, "
      "Tensor? head_bias, Tensor? scale, str kind, float eps, ScalarType? dtype) -> Tensor");
  m.def(
      "alignment_error_backward(Tensor grad_error, Tensor h, Tensor target, Tensor norm_weight, Tensor? norm_bias, "
      "Tensor head_weight, Tensor? head_bias, Tensor? scale, str kind, float eps, ScalarType? dtype) "
      "-> (Tensor grad_h, Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_head_weight, "
      "Tensor grad_head_bias)");

  // softmax(q k^T scale) v; mask (B, T) bool over keys. _qkv: of a layer's packed projection, with norm and rotary
  // embedding; _forward: both without gradient, (B, T, H, d), on a GPU; plan: csrc/attention.h, [] chooses one
  m.def("attention(Tensor q, Tensor k, Tensor v, bool causal, float scale, Tensor? mask) -> Tensor");
  m.def(
      "attention_qkv(Tensor qkv, int heads, bool causal, float scale, Tensor? mask, Tensor? q_norm, Tensor? k_norm, "
      "float eps, Tensor? cos, Tensor? sin, int prefix) -> Tensor");
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, bool causal, float scale, Tensor? mask, Tensor? q_norm, "
      "Tensor? k_norm, float eps, Tensor? cos, Tensor? sin, int prefix, int[] plan) -> Tensor");

  // the heads of a layer's packed projection, with norm and rotary embedding: q, k, v (B, H, T, d); CPU only
  m.def(
      "attention_heads(Tensor qkv, int heads, Tensor? q_norm, Tensor? k_norm, float eps, Tensor? cos, Tensor? sin, "
      "int prefix) -> (Tensor q, Tensor k, Tensor v)");
  m.def(
      "attention_heads_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor qkv, int heads, Tensor? q_norm, "
      "Tensor? k_norm, float eps, Tensor? cos, Tensor? sin, int prefix) "
      "-> (Tensor grad_qkv, Tensor grad_q_norm, Tensor grad_k_norm)");

  // attention over few tokens in bf16, without a mask; CPUs with tile products only. lse: log of the weights' sums
  m.def("attention_short(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> (Tensor o, Tensor lse)");
  m.def(
      "attention_short_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor lse, bool causal, float scale) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");

  // norm of x, or of h = x + residual; CUDA in Triton. narrow: a copy of the gradient in this dtype too
  m.def("norm(Tensor x, Tensor weight, Tensor? bias, str kind, float eps, ScalarType? dtype) -> Tensor");
  m.def(
      "add_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, str kind, float eps, ScalarType? dtype) "
      "-> (Tensor y, Tensor h)");
  m.def(
      "norm_backward(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor weight, Tensor? bias, str kind, float eps, "
      "ScalarType? narrow) -> (Tensor grad_x, Tensor grad_narrow, Tensor grad_weight, Tensor grad_bias)");

  // what an MLP does between its linear layers; CUDA in Triton, CPU swiglu only
  m.def("gate(Tensor m, str kind) -> Tensor");
  m.def("gate_backward(Tensor grad_y, Tensor m, str kind) -> Tensor");
}
