"""The figures of a plan as a Markdown table."""

from collections.abc import Mapping

from cromss_jax.costs import costs


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


def markdown(figures: Mapping[str, object]) -> str:
    """The figures of `plan.make_plan` in Markdown."""
    lines = [
        f"{figures['topology']}: {figures['chips']} chips, batch {figures['batch_size']}, "
        f"{figures['images_a_chip']} images per chip. {figures['data']}: "
        f"{figures['train_locations']} training locations, tiles of {figures['tile_size']} pixels, "
        f"{figures['seasons']} seasons.",
        "",
    ]
    if not figures["fits"]:
        sizes = figures["memory"]["peak"], figures["memory_available"]
        needed, available = (f"{size / costs.GIB:.2f}" for size in sizes)
        lines.append(f"Does not fit: a chip needs {needed} GiB and has {available}.")
        if not figures["largest_images_a_chip"]:
            lines.append("One image per chip does not fit: use a smaller network or crop.")
            return "\n".join(lines)
        how = {
            "compiled": "found by compiling",
            "estimated": "estimated in proportion from this one compile; --search finds it exactly",
        }
        lines.append(
            f"The largest that fits is config.batch_size {figures['largest_batch_size']}, "
            f"{figures['largest_images_a_chip']} images per chip ({how[figures['largest_is']]})."
        )
        return "\n".join(lines)

    chip = costs.CHIPS.get(figures["topology"].partition(":")[0])

    def at_peak(name: str, value: float, unit: str, peak: str) -> tuple[str, ...]:
        if not chip:
            return name, _amount(value, unit)
        milliseconds = figures["seconds"][name] * 1e3
        limit = f"{_amount(getattr(chip, peak), unit)}/s"
        return name, _amount(value, unit), limit, f"{milliseconds:.3g} ms"

    rows = [(f"memory: {k}", f"{v / costs.GIB:.3f} GiB") for k, v in figures["memory"].items()]
    if chip:
        share = figures["memory"]["peak"] / chip.memory
        rows[-1] += (f"{chip.memory / costs.GIB:.0f} GiB", f"{share:.0%} of it: fits")
    rows.append(at_peak("arithmetic", figures["flops"], "FLOP", "flops"))
    rows.append(at_peak("HBM traffic", figures["hbm_bytes"], "B", "hbm_bytes"))
    for kind, found in figures["collectives"].items():
        rows.append((f"{found['count']} {kind}", _amount(found["bytes"], "B")))
    if chip:
        rows.append(at_peak("interconnect", figures["sent_bytes"], "B", "ici_bytes"))
        step_milliseconds = figures["step_seconds"] * 1e3
        rows.append(("one step, at least", "", figures["bound_by"], f"{step_milliseconds:.3g} ms"))
        rows.append(("images per second, at most", "", "", f"{figures['images_per_second']:,.0f}"))
        name = f"{figures['num_epochs']} epochs, at least"
        hours = f"{figures['hours']:.3g} h, {figures['chip_hours']:.3g} chip-hours"
        rows.append((name, f"{figures['num_steps']:,} steps", "", hours))
        found = figures["reading"]
        name = f"reading, hosts {found['hosts']} x {found['cores_a_host']} cores"
        needed = f"{found['threads_a_host_needed']} threads per host"
        threads = f"config.data.num_threads {found['threads_a_host']}"
        rows.append((name, needed, threads, reading_verdict(found)))
    rows.append(("compiling", f"{figures['compile_seconds']} s"))
    lines += ["| per chip and step | needs | of | result |", "|---|---|---|---|"]
    lines += [f"| {' | '.join((*row, '', '')[:4])} |" for row in rows]
    return "\n".join(lines)
