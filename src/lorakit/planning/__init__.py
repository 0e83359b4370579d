"""Predict a run's memory, disk and time from its recipe and the model's config, without weights.

`gpus` and `known_models` are tables. `memory` sums the bytes of a training step with the engine,
`activations` counts those of a model's own layers on fake tensors; `placement` lists where weights
and activations can be kept; `planner` chooses. `stages` covers loading, evaluation and export,
`throughput` speed, `multi_gpu` the gain of more GPUs, `suggestions` changes that make a run fit,
`forecast` collects all of it.
"""
