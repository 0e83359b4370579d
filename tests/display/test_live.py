"""The curve is drawn while a run writes its metrics, in a real kernel; elsewhere nothing is."""

import json

import pytest

from lorakit.display.live import live_curve, loss_chart, losses_of


def rows(folder, *losses):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"step": n, "loss": loss}) for n, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_losses_are_read_and_a_skipped_step_is_a_gap(tmp_path):
    assert losses_of(tmp_path / "none") == []
    assert loss_chart([(1, None)]) is None
    rows(tmp_path / "run", 3.0, None, 1.0)
    chart = loss_chart(losses_of(tmp_path / "run"))
    assert chart.description == "Loss by step from 3 to 1"
    assert "no finite value" in chart.svg


def test_outside_of_a_notebook_nothing_is_drawn(tmp_path, capsys):
    with live_curve(tmp_path / "run", seconds=0.01):
        rows(tmp_path / "run", 3.0, 2.0)
    assert capsys.readouterr().out == ""


CELL = """
import json, threading
from pathlib import Path
from lorakit.display import live
folder, drawn, plain = Path("run"), threading.Semaphore(0), live.loss_chart
def counted(points):
    drawn.release()
    return plain(points)
folder.mkdir()
with live.live_curve(folder, seconds=0.02):
    live.loss_chart = counted
    with (folder / "metrics.jsonl").open("w") as log:
        for step in range(1, 4):
            log.write(json.dumps({"step": step, "loss": 4.0 / step}) + "\\n")
            log.flush()
            drawn.acquire()  # the next step is taken once this one is in the picture
"""


def test_in_a_kernel_one_picture_is_replaced_while_the_cell_runs(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="pip install 'lorakit[notebooks]'")
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    updates = []
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        startup_timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    seen = client.process_message

    def process(message, cell, index):
        if message["msg_type"] == "update_display_data":
            updates.append(message["content"]["data"]["image/svg+xml"])
        return seen(message, cell, index)

    client.process_message = process
    client.execute()
    (output,) = notebook.cells[0].outputs
    assert output.data["image/svg+xml"] == updates[-1]  # what is saved is the last picture
    assert len(set(updates)) >= 3  # it grew while the cell ran


def test_a_failing_run_leaves_its_picture_and_its_error(tmp_path):
    with pytest.raises(RuntimeError, match="out of luck"), live_curve(tmp_path / "run", 0.01):
        raise RuntimeError("out of luck")
