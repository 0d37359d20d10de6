"""What the loss-head benchmark concludes from its rows: ratios to the floor and the fastest equal, and the tables."""

from typing import Any

from benchmarks.head_contenders import EVERYTHING, FLOOR, OURS


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a dict per case: the floor, who is fastest among those that give the same outputs, and ours over both."""
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        here = [row for row in rows if row["case"] == case]
        ours = next((row["median_s"] for row in here if row["who"] == OURS), None)
        floors = [row["median_s"] for row in here if row["gives"] == FLOOR]
        equals = [row for row in here if row["gives"] == EVERYTHING and row["has_passed"] and row["who"] != OURS]
        if ours is None:
            continue
        line: dict[str, Any] = {"case": case}
        if floors:
            line |= {"floor_s": min(floors), "ours_over_floor": round(ours / min(floors), 4)}
        if equals:
            fastest = min(equals, key=lambda row: row["median_s"])
            line |= {"fastest_equal": fastest["who"], "ours_over_fastest": round(ours / fastest["median_s"], 4)}
        line["ours_over"] = {row["who"]: round(ours / row["median_s"], 4) for row in here if row["who"] != OURS}
        found.append(line)
    return found


def markdown(
    rows: list[dict[str, Any]], ratio_lines: list[dict[str, Any]], flops: dict[str, Any], extra: dict[str, Any]
) -> str:
    """Lay the rows out as one Markdown table and the conclusions as another."""
    floors = {line["case"]: line.get("floor_s") for line in ratio_lines}
    lines = ["| case | who | gives | gate | median s | min | max | / floor | extra MiB | n |", "|---" * 10 + "|"]
    for row in rows:
        floor = floors.get(row["case"])
        over = f"{row['median_s'] / floor:.2f}" if floor else ""
        memory = f"{row['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in row else ""
        times = " | ".join(f"{row[key]:.4g}" for key in ("median_s", "min_s", "max_s"))
        names = " | ".join(row[key] for key in ("case", "who", "gives", "gate"))
        lines.append(f"| {names} | {times} | {over} | {memory} | {row['samples']} |")
    lines += ["", "| case | ours / floor | ours / fastest equal | which is | matmuls, 2THV | at half the rows |"]
    lines[-1] += " extra MiB at T, 2T |"
    lines.append("|---" * 7 + "|")
    for line in ratio_lines:
        case = line["case"]
        count = flops.get(case, {})
        memory = ", ".join(f"{value / 2**20:.0f}" for value in extra.get(case, {}).values())
        figures = [line.get(key, "") for key in ("ours_over_floor", "ours_over_fastest", "fastest_equal")]
        figures += [count.get(key, "") for key in ("units_of_2THV", "share_with_half_the_rows_weightless")]
        if not count.get("is_complete", True):
            figures[-2] = f"{figures[-2]} (incomplete)"
        lines.append("| " + " | ".join(str(value) for value in [case, *figures, memory]) + " |")
    return "\n".join(lines)
