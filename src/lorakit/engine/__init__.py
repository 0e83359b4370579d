"""Fused decoder layers with hand-written gradients, and what moves their data.

The engine replaces the decoder layers of a PEFT model in training: fused LoRA linears and kernels
(`decoder_layer`, `chunked_layer`, `lora_linear`, `attention`), one layer at a time (`layerwise`),
CUDA graphs (`cuda_graphs`), and offload to host memory (`activation_offload`, `adapter_offload`,
`weight_streaming`). `attach` chooses; `self_test` compares with plain torch before a run.
"""
