"""A checkpoint comes with the first step after the minutes are over, counted from the last save."""

from transformers import TrainerControl

from lorakit.train.callbacks import TimedCheckpoint


def test_it_asks_when_the_time_is_over_and_counts_from_each_save():
    times = iter([0, 30, 61, 62, 70, 130])
    clock = TimedCheckpoint(1, bool, now=lambda: next(times))
    clock.on_train_begin(None, None, None)  # 0 s

    def asked():
        return clock.on_step_end(None, None, TrainerControl()).should_save

    assert not asked()  # 30 s
    assert asked()  # 61 s
    clock.on_save(None, None, None)  # 62 s
    assert not asked()  # 70 s: another reason saved in between would count as well
    assert asked()  # 130 s
