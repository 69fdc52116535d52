"""Where mistakes have been reported in public: one thread or more for each that was found.

Read as they were stored; several are of other models than Qwen2.5, with the same mistake.
"""

_HUB = "https://github.com/"

SEEN = {
    name: tuple(_HUB + thread for thread in threads.split())
    for name, threads in {
        "norm-eps": "apache/tvm/pull/15856 meta-llama/llama/issues/771",
        "norm-eps-outside": "allenai/OLMo/issues/281 tile-ai/tilelang/pull/1243",
        "norm-eps-of-maximum": "apple/coremltools/pull/2822",
        "norm-per-shard": "axonn-ai/yalis/pull/36",
        "norm-mean-subtracted": "ggml-org/llama.cpp/issues/173",
        "norm-multiplied": "mosaicml/llm-foundry/issues/371",
        "norm-over-all": "bkitano/llama-from-scratch/issues/4",
        "norm-one-plus-weight": "linkedin/Liger-Kernel/issues/74 pytorch/executorch/pull/19901",
        "norm-two-plus-weight": "kekzl/imp/pull/459 utensils/mold/pull/1078",
        "norm-of-other": "NVIDIA-NeMo/Speech/issues/11951 NVIDIA-NeMo/Megatron-Bridge/pull/4201",
        "projection-untransposed": "vllm-project/vllm/pull/44113 paiml/aprender/pull/1466",
        "projection-swapped": "huggingface/transformers/pull/40257",
        "projection-grouped": "tenstorrent/tt-metal/issues/6243",
        "projection-gguf-order": "ggml-org/llama.cpp/issues/3018 jzhang38/TinyLlama/issues/24",
        "projection-gguf-inverse": "ggml-org/llama.cpp/pull/2398",
        "projection-gguf-heads": "huggingface/transformers/pull/31788",
        "projection-part-of-inputs": "tile-ai/tilelang-ascend/issues/1341",
        "bias-missing": "sbryngelson/ANEForge/pull/253 EricLBuehler/candle-vllm/pull/167",
        "bias-doubled": "Wenyueh/MinivLLM/issues/80 "
        "huggingface/text-generation-inference/issues/1036",
        "rope-interleaved": "NeuraLegion/shainet/pull/111 ohdearquant/lattice/pull/96",
        "rope-table-interleaved": "raiyanyahya/how-to-train-your-gpt/pull/7",
        "rope-theta": "turboderp/exllama/issues/270 lyogavin/airllm/issues/368",
        "rope-exponent": "bkitano/llama-from-scratch/issues/8 pie-project/pie/pull/603",
        "rope-coarse": "sgl-project/sglang-jax/pull/1473 huggingface/candle/pull/3520",
        "rope-offset": "fla-org/flash-linear-attention/issues/766",
        "rope-positions": "skyzh/tiny-llm/pull/46 huggingface/transformers/issues/43082",
        "rope-by-head": "elixir-nx/emlx/issues/121 mlfoundations/open_lm/issues/4",
        "rope-cos-sin-swapped": "rasbt/LLMs-from-scratch/pull/381",
        "rope-skipped": "kvcache-ai/sglang/pull/31 PaddlePaddle/PaddleFleet/pull/91",
        "rope-partial": "vllm-project/vllm/pull/41185",
        "rope-scaled": "mit-han-lab/llm-awq/pull/333",
        "rope-yarn": "QwenLM/Qwen3/issues/1567",
        "scores-scale": "mlc-ai/mlc-llm/pull/3426 lucidrains/vit-pytorch/issues/65",
        "scores-gqa": "apple/axlearn/pull/842 state-spaces/mamba/pull/462",
        "mask-missing": "lablup/mlxcel/pull/998 huggingface/candle/pull/3609",
        "mask-window": "huggingface/transformers/issues/38002 InternLM/lmdeploy/pull/3614",
        "mask-weak": "NVIDIA/TransformerEngine/pull/1268 huggingface/transformers/pull/17306",
        "softmax-overflow": "pytorch/executorch/pull/18407 NVIDIA/FasterTransformer/issues/43",
        "softmax-over-queries": "labmlai/annotated_deep_learning_paper_implementations/issues/146",
        "softmax-one-unscaled": "kyegomez/AttentionIsOFFByOne/issues/5",
        "values-keys": "snu-comparch/InfiniGen/issues/5",
        "values-rotated": "lucidrains/x-transformers/issues/182",
        "values-head-order": "huggingface/transformers/pull/34942 "
        "jsbaan/transformer-from-scratch/pull/6",
        "output-one-group": "FlashML-org/FreeToken/pull/440",
        "output-bias": "sgl-project/sglang-jax/pull/578 marin-community/levanter/pull/1132",
        "any-of-stage": "ndif-team/nnsight/issues/630 ggml-org/ggml/issues/700",
        "any-zeros": "tenstorrent/tt-metal/pull/55689 tenstorrent/tt-metal/issues/54413",
        "any-not-finite": "ggml-org/llama.cpp/issues/7805 vllm-project/vllm/pull/19784",
    }.items()
}
"""By the id of the mistake."""
