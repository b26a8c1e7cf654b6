"""One real call: a small table goes through the gateway to the engine, and the right slices come back.

`helm test` runs it; HIBUG2_ADDRESS says where the gateway is.
"""

import pyarrow as pa

from hibug2 import Client

COLOURS, POSES = ["red", "blue"] * 10, ["sitting"] * 10 + ["lying"] * 10
table = pa.table({"color": COLOURS, "pose": POSES, "right": [0.0] * 10 + [1.0] * 10})
with Client() as client:
    slices = client.enumerate(table, ["right"], depth=2, min_count=5).to_pylist()
found = {
    tuple((pair["attribute"], pair["tag"]) for pair in row["tags"]): (row["count"], row["right_mean"]) for row in slices
}
expected = {(("color", c),): (10, 0.5) for c in ("red", "blue")}
for pose, mean in (("sitting", 0.0), ("lying", 1.0)):
    expected[(("pose", pose),)] = (10, mean)
    expected.update({(("color", c), ("pose", pose)): (5, mean) for c in ("red", "blue")})
if found != expected:
    raise SystemExit(f"the engine answered wrongly: {found}, expected {expected}")
print(f"the platform answers: {len(found)} slices, as they should be")
