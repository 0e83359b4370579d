"""What one asks before a run."""

import json


def test_schema_is_json(lorakit):
    code, out, _ = lorakit("schema")
    assert code == 0
    assert json.loads(out)["title"] == "lorakit recipe"
