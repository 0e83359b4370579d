"""The 26 ways in which fine-tuning fails in silence, the check for each, and a test of it.

`benchmarks/silent_failures.py` takes each check out of a copy of the source and sees its test fail.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Class:
    """One way to fail.

    Attributes:
        test: the test that is red without the check.
        file: where the check stands, under src/lorakit.
        check, without: a text that stands there once, and what it is when the check is gone (or
            the mistake that it guards against is made).
        note: what this test cannot show.
    """

    name: str
    test: str
    file: str
    check: str
    without: str
    note: str = ""


CHECKS = "tests/data/tokenize/test_example_checks.py"
VERIFY = f"{CHECKS}::test_verify_refuses_masked_unclosed_and_doubled_examples"
RESUME = (
    "tests/train/test_resume.py::"
    "test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one[lora]"
)

CLASSES = [
    Class(
        "every label masked, loss 0.0",
        VERIFY,
        "data/tokenize/example_checks.py",
        "if not example.trained_tokens:",
        "if False:",
    ),
    Class(
        "truncation takes the answer",
        "tests/data/tokenize/test_encode.py::test_an_answer_that_would_be_cut_is_left_out_by_name",
        "data/tokenize/encode.py",
        "            if len(example.input_ids) > rules.cutoff_len:\n",
        "            if False:\n",
    ),
    Class(
        "the answer is cut, so its end is never learned",
        VERIFY,
        "data/tokenize/example_checks.py",
        "if not closed and turn.count(IGNORE) < len(turn):",
        "if False:",
    ),
    Class(
        "the mask covers everything, or nothing",
        "tests/data/tokenize/test_encode.py::test_exactly_the_answers_and_their_end_of_turn_are_trained",
        "data/tokenize/encode.py",
        'labels = [IGNORE, *ids[1:]] if train_on == "all" else [IGNORE] * len(ids)',
        "labels = [IGNORE, *ids[1:]]",
    ),
    Class(
        "a fast loss ignores the mask",
        "tests/train/test_trainer.py::test_rows_reach_the_model_whole_and_untouched[False]",
        "data/batching.py",
        "(labels[1:] != IGNORE).nonzero()",
        "(labels[1:] != 0).nonzero()",
    ),
    Class(
        "the end of the turn is outside the mask",
        "tests/data/tokenize/test_encode.py::test_exactly_the_answers_and_their_end_of_turn_are_trained",
        "data/tokenize/encode.py",
        "labels[start : end(start)] = ids[start : end(start)]",
        "labels[start : end(start) - 1] = ids[start : end(start) - 1]",
    ),
    Class("two BOS", VERIFY, "data/tokenize/example_checks.py", "ids[:2] == [bos, bos]", "False"),
    Class(
        "padding is the end of turn, which is masked with it",
        "tests/data/test_batching.py::test_padding_is_on_the_right_and_carries_no_target",
        "data/batching.py",
        "(labels[1:] != IGNORE).nonzero()",
        "((labels[1:] != IGNORE) & (labels[1:] != 2)).nonzero()",
    ),
    Class(
        "generation does not stop where training taught it",
        "tests/inference/test_generate.py::test_a_batch_answers_like_one_by_one_and_like_the_stream",
        "inference/generate.py",
        "stop_token_ids(tokenizer, model.generation_config)",
        "0",
        "the template of exported files: tests/export/test_gguf.py",
    ),
    Class(
        "new tokens without a trained embedding",
        "tests/model/test_vocabulary.py::test_added_tokens_without_a_row_are_refused",
        "model/load.py",
        "    if beyond:",
        "    if False:",
    ),
    Class(
        "a merge breaks tied embeddings",
        "tests/export/test_merged.py::test_a_merge_that_differs_is_not_kept",
        "export/merged.py",
        "if not sum_kl <= LARGEST_KL:",
        "if False:",
    ),
    Class(
        "the adapter is empty, zero or NaN",
        "tests/train/test_checkpoint.py::test_one_number_that_is_not_finite_keeps_an_adapter_from_being_saved",
        "train/checkpoint.py",
        "    _check_learned(model)\n",
        "",
    ),
    Class(
        "adapter keys were renamed, so it does nothing",
        "tests/model/test_load.py::test_an_adapter_of_renamed_tensors_is_refused",
        "model/load.py",
        "    check_all_tensors_used(model, run)\n",
        "",
    ),
    Class(
        "a resume drops the optimizer",
        RESUME,
        "train/trainer.py",
        "    def close(self) -> Any:\n",
        "    def _load_optimizer_and_scheduler(self, checkpoint):\n        pass\n\n"
        "    def close(self) -> Any:\n",
    ),
    Class(
        "a torn checkpoint is loaded, or blocks the resume",
        "tests/train/test_checkpoint.py::test_a_damaged_checkpoint_is_passed_over_with_a_word",
        "train/checkpoint.py",
        "    for folder in reversed(run.list_checkpoints()):\n",
        "    for folder in reversed(run.list_checkpoints()):\n        return folder, notes\n",
    ),
    Class(
        "another order of the data after a resume",
        RESUME,
        "train/training_args.py",
        '        "data_seed": recipe.seed,\n',
        '        "data_seed": __import__("time").monotonic_ns() % 2**31,\n',
    ),
    Class(
        "the loss depends on accumulation",
        "tests/train/test_trainer.py::test_gradient_of_a_step_is_the_same_for_any_split",
        "train/trainer.py",
        "loss = self.model(**micro, use_cache=False).loss_sum * scale",
        'loss = self.model(**micro, use_cache=False).loss_sum / len(micro["targets"])',
    ),
    Class(
        "the learning rate ends early",
        "tests/train/test_diagnostics.py::test_a_rate_that_ends_early_is_said_where_it_does",
        "train/diagnostics.py",
        '            "rate": self._ended_early(row),\n',
        "",
    ),
    Class(
        "packed documents see each other",
        "tests/train/test_loss.py::test_a_model_whose_attention_mixes_documents_is_not_packed",
        "train/packing.py",
        "    lengths = (5, 7)\n",
        "    return PACKED\n    lengths = (5, 7)\n",
    ),
    Class(
        "the merged model is worse than the adapter",
        "tests/export/test_merged.py::test_damaged_files_are_noticed_and_not_kept",
        "export/merged.py",
        "if not torch.equal(parameter, stored.to(parameter.dtype)):",
        "if False:",
    ),
    Class(
        "no gradient reaches the adapters",
        "tests/train/test_stability.py::test_no_gradient_at_all_stops_the_first_step",
        "train/stability.py",
        "    if len(without) == len(checked):",
        "    if False:",
    ),
    Class(
        "bfloat16 on a card without it",
        "tests/test_hardware.py::test_cards_without_bf16_get_float16",
        "hardware.py",
        "native_bf16 = major >= 8",
        "native_bf16 = major >= 1",
        "the decision alone, on a card that is made up; no T4 was at hand",
    ),
    Class(
        "NaN goes on training and takes the good checkpoints with it",
        "tests/train/test_stability.py::"
        "test_one_bad_step_is_skipped_and_leaves_weights_and_optimizer_alone",
        "train/stability.py",
        "        model.zero_grad(set_to_none=True)\n",
        "",
    ),
    Class(
        "memory that runs out changes the effective batch",
        "tests/train/test_oom_retry.py::"
        "test_a_run_out_of_memory_ends_like_one_with_smaller_micro_batches[forward-False]",
        "train/oom.py",
        "step = step_batches(step.examples, self.layout)",
        "step = step_batches(step.examples[: self.layout.rows], self.layout)",
    ),
    Class(
        "rotation deletes the wrong checkpoint",
        "tests/train/test_checkpoint.py::test_rotation_keeps_the_newest",
        "train/checkpoint.py",
        "[:-keep]",
        "[keep:]",
    ),
    Class(
        "one of several processes hangs, or has no data, and the others wait for ever",
        "tests/distributed/test_rank_watch.py::test_the_others_name_rank_0_once_and_only_if_it_said_nothing",
        "distributed/rank_watch.py",
        "if reports == 1 else",
        "if False else",
        "the judgment alone; a real process stopped, killed, failing at start or without a row: "
        "tests/test_ranks_end_to_end.py",
    ),
]
