"""The figures of a plan as a Markdown table."""

from collections.abc import Mapping

from cromss_jax.costs.chips import CHIPS, GIB, Chip


def _amount(value: float, unit: str) -> str:
    """Formats an amount with a decimal prefix: "60.4 GB" for 60.4e9 bytes."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000


def reading_verdict(found: Mapping[str, object]) -> str:
    """One sentence about the figures of `costs.reading`."""
    if found["keeps_up"]:
        return "keeps up"
    if found["could_keep_up"]:
        return f"too slow: set config.data.num_threads to {found['threads_a_host_needed']}"
    return f"too slow for any number of threads: a host has {found['cores_a_host']} cores"


def _memory_limit(figures: Mapping[str, object], chip: Chip) -> str:
    """One sentence about the memory that a step may take of a GPU."""
    share, total = figures["memory_fraction"], chip.memory / GIB
    return (
        f"JAX takes {100 * share:g}% of a GPU's {total:.1f} GiB, {share * total:.1f} GiB; "
        "XLA_PYTHON_CLIENT_MEM_FRACTION sets another share."
    )


def _too_large(figures: Mapping[str, object], word: str) -> list[str]:
    """Sentences about a step that does not fit."""
    sizes = figures["memory"]["peak"], figures["memory_available"]
    needed, available = (f"{size / GIB:.2f}" for size in sizes)
    lines = [f"Does not fit: a {word} needs {needed} GiB and has {available}."]
    if figures["largest_images_a_chip"]:
        how = {
            "compiled": "found by compiling",
            "estimated": "estimated in proportion from this one compile; --search finds it exactly",
        }
        lines.append(
            f"The largest that fits is config.batch_size {figures['largest_batch_size']}, "
            f"{figures['largest_images_a_chip']} images per {word} ({how[figures['largest_is']]})."
        )
        lines.append("The same batch takes less memory with more config.microbatches")
    else:
        lines.append("Not even the smallest batch fits: use a smaller network or crop")
    lines[-1] += "." if figures["rematerialised"] else ", or config.rematerialise=True."
    return lines


def _loop_rows(figures: Mapping[str, object]) -> list[tuple[str, ...]]:
    """Rows about the launches and loops of a GPU's program."""
    beside = "microseconds each, not in the times"
    rows = [("launches", f"{figures['launches']:,.0f}", "", beside)]
    rounds = [loop["rounds"] for loop in figures["loops"]]
    if known := [str(number) for number in rounds if number is not None]:
        rows.append(("loops", f"{' + '.join(known)} rounds"))
    for loop in figures["loops"]:
        if loop["rounds"] is None:
            assumed = f"counted as {figures['unknown_rounds']:g} rounds"
            rows.append((f"loop of unknown length: {loop['name']}", assumed, "", "the host waits"))
    return rows


def _bound_rows(figures: Mapping[str, object], word: str) -> list[tuple[str, ...]]:
    """Rows about times, all of them bounds."""
    step_milliseconds = figures["step_seconds"] * 1e3
    hours = f"{figures['hours']:.3g} h, {figures['chip_hours']:.3g} {word}-hours"
    steps = f"{figures['num_steps']:,} steps"
    validated = f"{figures['num_validated']:,} images"
    found = figures["reading"]
    needed = f"{found['threads_a_host_needed']} threads per host"
    threads = f"config.data.num_threads {found['threads_a_host']}"
    name = f"reading, hosts {found['hosts']} x {found['cores_a_host']} cores"
    return [
        ("one step, at least", "", figures["bound_by"], f"{step_milliseconds:.3g} ms"),
        ("images per second, at most", "", "", f"{figures['images_per_second']:,.0f}"),
        ("validation, at least", validated, "", f"{figures['validation_hours']:.3g} h"),
        (f"{figures['num_epochs']} epochs with validation, at least", steps, "", hours),
        (name, needed, threads, reading_verdict(found)),
    ]


def markdown(figures: Mapping[str, object]) -> str:
    """The figures of `plan.make_plan` in Markdown."""
    chip = CHIPS.get(figures["topology"].partition(":")[0])
    is_gpu = chip is not None and chip.is_gpu
    word = "GPU" if is_gpu else "chip"
    lines = [
        f"{figures['topology']}: {figures['chips']} {word}s, batch {figures['batch_size']}, "
        f"{figures['images_a_chip']} images per {word}. {figures['data']}: "
        f"{figures['train_locations']} training locations, tiles of {figures['tile_size']} pixels, "
        f"{figures['seasons']} seasons.",
        "",
    ]
    if is_gpu:
        lines[1:1] = [_memory_limit(figures, chip)]
    if not figures["fits"]:
        return "\n".join(lines + _too_large(figures, word))

    def at_peak(name: str, value: float, unit: str, peak: str) -> tuple[str, ...]:
        if not chip:
            return name, _amount(value, unit)
        milliseconds = figures["seconds"][name] * 1e3
        limit = f"{_amount(getattr(chip, peak), unit)}/s"
        return name, _amount(value, unit), limit, f"{milliseconds:.3g} ms"

    rows = [(f"memory: {k}", f"{v / GIB:.3f} GiB") for k, v in figures["memory"].items()]
    if chip:
        available = figures["memory_available"]
        share = figures["memory"]["peak"] / available
        amount = f"{available / GIB:.{1 if is_gpu else 0}f} GiB"
        rows[-1] += (amount, f"{share:.0%} of it: fits")
    rows.append(at_peak("arithmetic", figures["flops"], "FLOP", "flops"))
    rows.append(at_peak("HBM traffic", figures["hbm_bytes"], "B", "hbm_bytes"))
    if is_gpu:
        rows += _loop_rows(figures)
    for kind, found in figures["collectives"].items():
        rows.append((f"{found['count']} {kind}", _amount(found["bytes"], "B")))
    if chip:
        rows.append(at_peak("interconnect", figures["sent_bytes"], "B", "link_bytes"))
        if "network" in figures["seconds"]:
            rows.append(at_peak("network", figures["network_bytes"], "B", "network_bytes"))
        rows += _bound_rows(figures, word)
    rows.append(("compiling", f"{figures['compile_seconds']} s"))
    lines += [f"| per {word} and step | needs | of | result |", "|---|---|---|---|"]
    lines += [f"| {' | '.join((*row, '', '')[:4])} |" for row in rows]
    return "\n".join(lines)
