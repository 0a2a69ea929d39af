"""Tables of the documents, made from the figures in results.json.

A table function takes the figures of one part, the last line that its bench prints, and returns
Markdown. It shows the rows and columns of which there are figures.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from cromss_jax import presets, sensors
from tests.bench import parts

MARKED = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
DECODERS = {"pspnet": "PSPNet", "unet": "U-Net"}
ENCODERS = {"frozen": "frozen", "trained": "fine-tuned"}
SAMPLE_ROWS = {
    "s1": "S1 against noisy labels",
    "s2": "S2 against noisy labels",
    "truth/labels": "noisy labels against truth",
    "truth/s1": "S1 against truth",
    "truth/s2": "S2 against truth",
}
SCORES = {"oa": "OA", "aa": "AA", "miou": "mIoU", "mf1": "mF1"}
STEP_PARTS = {
    "encoder": "encoder, ResNet-50, S2",
    "decoder": "decoder of it",
    "selection_losses_priors": "selection, losses and priors",
    "preprocessing": "upsampling, crop, flips, rotation (PyTorch: on the host, not upsampled)",
}
INPUT_ROWS = {
    "samples_per_second": ("samples per second", 1, ".4g"),
    "samples_per_second_per_core": ("samples per second and core", 1, ".4g"),
    "read_bytes_a_sample": ("MB read per sample", 1e6, ".2f"),
    "disk_bytes_a_location": ("MB on disk per location", 1e6, ".2f"),
    "batch_bytes_a_sample": ("MB of a sample in a batch", 1e6, ".2f"),
    "memory_bytes": ("memory, MB", 1e6, ".0f"),
}
TPU_PARTS = ("preprocessing", "prior", "encoder", "decoder", "selection", "losses")
COMPARED_RUNS = {
    "two processes": "two processes of four devices each",
    "8 to 4 to 1": "8 devices, continued on 4 and on 1",
    "1 to 2 processes": "one process, continued as two",
    "ended": "two processes, one of which is killed or interrupted, started again",
}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: float | None) -> str:
    """A share in percent; undefined scores are None."""
    return "–" if value is None else f"{100 * value:.1f}"


def spread(summary: Mapping | None, with_seeds: bool = False) -> str:
    """Mean ± standard deviation over seeds, and each seed's value where they are known."""
    if summary is None:
        return ""
    text = f"{summary['mean']:.1f}"
    if "std" in summary:
        text += f" ± {summary['std']:.1f}"
    if with_seeds and "seeds" in summary:
        text += f" ({', '.join(f'{value:.1f}' for value in summary['seeds'])})"
    return text


def sample(figures: Mapping) -> str:
    """Scores of the sample run."""
    rows = [
        [label]
        + [percent(figures[f"{name}/{score}"]) for score in SCORES]
        + [
            percent(figures[f"{name}/iou/{class_name}"])
            for class_name in presets.DYNAMIC_WORLD.names
        ]
        for name, label in SAMPLE_ROWS.items()
    ]
    aurocs = " and ".join(
        f"{figures[f'label_confidence_auroc/{m}']:.3f} ({m.upper()})" for m in sensors.MODALITIES
    )
    scores = table(["scored", *SCORES.values(), *presets.DYNAMIC_WORLD.names], rows)
    return f"{scores}\n\nLabel confidence tells wrong labels from right ones with AUROC {aurocs}."


def sample_in_short(figures: Mapping) -> str:
    """The same against truth alone, without classes."""
    kept = {name: label for name, label in SAMPLE_ROWS.items() if name.startswith("truth/")}
    scores = {name: label for name, label in SCORES.items() if name != "aa"}
    rows = [
        [label, *(percent(figures[f"{name}/{score}"]) for score in scores)]
        for name, label in kept.items()
    ]
    return table(["scored", *scores.values()], rows)


def claims(figures: Mapping) -> str:
    """mIoU by way and by what is transferred, differences, and what was selected."""

    def by_kind(found: Mapping[str, Mapping], corner: str, with_seeds: bool) -> str:
        cells = {tuple(name.split("/", 1)): summary for name, summary in found.items()}
        ways, kinds = (dict.fromkeys(key[i] for key in cells) for i in (0, 1))
        header = [corner]
        for kind in kinds:
            modality, encoder, decoder = kind.split("/")
            header.append(f"{modality.upper()} {ENCODERS[encoder]}, {DECODERS[decoder]}")
        return table(
            header,
            (
                [way, *(spread(cells.get((way, kind)), with_seeds) for kind in kinds)]
                for way in ways
            ),
        )

    shown = [by_kind(figures["miou"], "mIoU", False)]
    if figures["differences"]:
        shown.append(by_kind(figures["differences"], "difference, by seed", True))
    if selected := figures["wrong_labels_selected"]:
        moments = dict.fromkeys(moment for shares in selected.values() for moment in shares)
        rows = [
            [name.replace("/s1", ", S1").replace("/s2", ", S2")]
            + [f"{shares[moment]:.0f} %" for moment in moments]
            for name, shares in selected.items()
        ]
        shown.append(table(["wrong labels among the selected, by epoch", *moments], rows))
    return "\n\n".join(shown)


def claims_in_short(figures: Mapping) -> str:
    """mIoU of frozen encoders, randomly initialised and pretrained."""
    ways = ("random", "CromSS mid")
    rows = [
        [m.upper(), *(spread(figures["miou"][f"{way}/{m}/frozen/pspnet"]) for way in ways)]
        for m in sensors.MODALITIES
    ]
    return table(["input", "random", "CromSS, mid fusion"], rows)


def step(figures: Mapping) -> str:
    """Seconds and ratio of each case."""
    rows = []
    for case, seconds in figures["seconds"].items():
        part, size = case.rsplit("_", 1)
        if whole := re.fullmatch(r"resnet(\d+)_(mid|late)", part):
            part = f"whole step, ResNet-{whole[1]}, {whole[2]} fusion"
        label = f"{STEP_PARTS.get(part, part)}, {size.replace('x', ' x ')} pixels"
        times = (f"{seconds[side]:.3f} s" for side in ("ours", "pytorch"))
        rows.append([label, *times, f"{figures[case]:.2f}"])
    return table(["", "ours", "PyTorch", "ours / PyTorch"], rows)


def input_(figures: Mapping) -> str:
    """Ours beside the published pipeline."""
    rows = [
        [
            label,
            f"{figures[name] / unit:{digits}}",
            f"{figures['lmdb'][name] / unit:{digits}}",
            f"{figures[f'{name}_ratio']:.3g}",
        ]
        for name, (label, unit, digits) in INPUT_ROWS.items()
        if name in figures
    ]
    return table(["", "ours", "PyTorch", "ours / PyTorch"], rows)


def end_to_end(figures: Mapping) -> str:
    """Speed of `main` by depth, and its starts."""
    rows = []
    for name, value in figures.items():
        if found := re.fullmatch(r"resnet(\d+)_(.*)", name):
            what, shown = {
                "images_per_second": ("images per second", f"{value:.2f}"),
                "wait_for_data": ("share of time that waits for data", f"{100 * value:.2g} %"),
            }[found[2]]
            rows.append([f"ResNet-{found[1]}, {what}", shown])
        elif name == "first_start_seconds":
            rows.append(["first start of the sample, to its first step", f"{value:.0f} s"])
        elif name == "second_start_seconds":
            rows.append(["second start, from compiled programs", f"{value:.0f} s"])
    return table(["`main`", ""], rows)


def tpu(figures: Mapping) -> str:
    """Traffic, computation and memory by images a chip."""
    header = ["images a chip", "HBM, GB an image", *TPU_PARTS, "others"]
    header += ["beside the networks", "TFLOP an image", "temporaries"]
    rows = []
    for images, found in figures.items():
        if "needed_gib" in found:
            text = f"does not fit: {found['needed_gib']:.2f} GiB"
            rows.append([images, text, *[""] * (len(header) - 2)])
            continue
        megabytes = {part: 1e3 * size for part, size in found["parts_gigabytes"].items()}
        parts_ = [megabytes.get(part, 0) for part in TPU_PARTS]
        parts_.append(sum(megabytes.values()) - sum(parts_))
        rows.append(
            [
                images,
                f"{found['hbm_gigabytes']:.3f}",
                *(f"{size:.0f}" for size in parts_),
                f"{found['beside_the_networks']:.1%}",
                f"{found['teraflop']:.3f}",
                f"{found['temporaries_gib']:.2f} GiB",
            ]
        )
    return table(header, rows)


def gpu(figures: Mapping) -> str:
    """Our step and PyTorch's, then where the time of ours goes."""
    speeds = {}
    for ours, theirs, images in (("step", "torch", 64), ("step128", "torch128", 128)):
        speeds[f"ours, {images}"] = figures.get(ours, {})
        for way, found in figures.get(theirs, {}).items():
            if isinstance(found, Mapping):
                speeds[f"PyTorch {way}, {images}"] = found
    rows = [
        [
            label,
            f"{found['images_per_second']:.0f}",
            f"{found['step_milliseconds']:.1f}",
            f"{found['peak_gigabytes']:.1f}",
        ]
        for label, found in speeds.items()
        if "step_milliseconds" in found
    ]
    shown = [table(["step, images", "images per second", "ms", "peak memory, GB"], rows)]
    if kernels := figures.get("step", {}).get("kernels"):
        rows = [[name, f"{count:.0f}", f"{ms:.2f}"] for name, count, ms in kernels["parts"]]
        shown.append(table(["part of ours, 64 images", "kernels", "ms"], rows))
        shown.append(
            f"{kernels['kernels']:.0f} kernels a step, {kernels['below_5_microseconds']:.0f} below "
            f"5 us; the device idles {kernels['idle_share']:.1%} of the time."
        )
    return "\n\n".join(shown)


def scaling(figures: Mapping) -> str:
    """What a device communicates, computes and holds by number of devices."""
    header = ["devices", "all-reduce", "their MB", "all-gather", "others", "GFLOP"]
    header += ["temporaries, MB", "seconds of compiling"]
    rows = [
        [
            devices,
            str(found["all_reduce_count"]),
            f"{found['all_reduce_bytes'] / 1e6:.2f}",
            str(found["all_gather_count"]),
            str(found["other_collectives"]),
            f"{found['flops'] / 1e9:.3f}",
            f"{found['temporary_bytes'] / 1e6:.1f}",
            f"{found['compile_seconds']:.1f}",
        ]
        for devices, found in figures.items()
    ]
    return table(header, rows)


def processes(figures: Mapping) -> str:
    """Differences between runs that are to be the same, and how lost processes end."""
    rows = [
        [
            label,
            f"{figures[name]['loss_difference']:.1e}".replace("e-0", "e-"),
            "the same" if figures[name]["same_samples_and_views"] else "DIFFERENT",
        ]
        for name, label in COMPARED_RUNS.items()
        if name in figures
    ]
    header = ["against one process of 8 devices", "largest relative difference of losses"]
    shown = [table([*header, "samples and views"], rows)]
    ends = [
        [name, f"{found['seconds_until_the_other_ended']} s", str(found["its_status"])]
        for name, found in figures.items()
        if isinstance(found, Mapping) and "its_status" in found
    ]
    if ends:
        shown.append(table(["signal", "the other process exits after", "with status"], ends))
    return "\n\n".join(shown)


def mutants(figures: Mapping) -> str:
    """How many wrong lines were noticed, and how many could not be."""
    noticed = figures.get("failed", 0) + figures.get("took too long", 0)
    counts = [noticed, figures.get("LIVED", 0), figures.get("equal", 0)]
    share = f"{100 * figures['killed_share']:.0f} %"
    head = ["wrong lines noticed", "not noticed", "equal in effect", "noticed of the first two"]
    return table(head, [[*map(str, counts), share]])


def fuzz(figures: Mapping) -> str:
    """What happened to the files of each reader."""
    rows = [
        [name.replace("_", " "), *(str(found[key]) for key in ("read", "refused", "faults"))]
        for name, found in figures.items()
    ]
    return table(["reader", "files read", "refused in a sentence", "faults"], rows)


def faults(figures: Mapping) -> str:
    """What happened at each kind of fault, and how often."""
    rows = [
        [
            name.replace("_", " "),
            str(sum(happened.values())),
            ", ".join(f"{outcome}: {number}" for outcome, number in happened.items()),
        ]
        for name, happened in figures.items()
    ]
    return table(["fault", "injected", "what happened"], rows)


def maps(figures: Mapping) -> str:
    """Speed of maps and of the loop."""
    rows = [
        [
            label,
            f"{figures[f'{name}_pixels_per_processors']:,.0f}",
            f"{figures[f'{name}_pixels_per_seconds']:,.0f}",
        ]
        for name, label in (("predict", "`predict`"), ("loop", "smp and PyTorch"))
    ]
    speeds = table(["", "pixels per second of the processors", "pixels per second"], rows)
    return f"{speeds}\n\nThe same class at {100 * figures['same_classes']:.2f} % of the pixels."


def audit(figures: Mapping) -> str:
    """How wrong labels are ranked, estimated and cleaned; values in the order of the seeds."""
    seeds = figures["seeds"]

    def each(*path: str, form: str = ".3f", factor: float = 1) -> str:
        found = []
        for own in seeds.values():
            for name in path:
                own = None if own is None else own.get(name)
            found.append("–" if own is None else f"{factor * own:{form}}")
        return ", ".join(found)

    def shown_of(name: str) -> Mapping:
        """Of the first seed that has it: an interrupted bench has not measured all."""
        return next((own[name] for own in seeds.values() if name in own), {})

    def ranking(part: str) -> list[list[str]]:
        return [
            [name, each(part, name, "auroc"), each(part, name, "auprc")]
            + [each(part, name, f"precision_at_{n}", form=".1f", factor=100) for n in (1, 5, 10)]
            for name in shown_of(part)
        ]

    header = ["evidence", "AUROC", "AUPRC", *(f"precision at {n} %" for n in (1, 5, 10))]
    shown = [f"Seeds {', '.join(seeds)}, in this order.", table(header, ranking("ranking"))]
    rows = [
        ["all labels", *(each("rates", n, form=".1f", factor=100) for n in ("estimate", "truth"))]
    ]
    for name in shown_of("rates")["classes"]:
        pairs = [own["rates"]["classes"][name] for own in seeds.values()]
        rows.append([name, *(", ".join(map(percent, side)) for side in zip(*pairs, strict=True))])
    error = each("rates", "calibration_error", form=".1f", factor=100)
    rows.append(["calibration error", error, ""])
    shown.append(table(["wrong labels, in percent", "estimated", "true"], rows))
    if kinds := shown_of("kinds"):
        shown.append(_kinds(kinds, each))
    if selection := ranking("selection"):
        shown.append(table(["network with or without selection", *header[1:]], selection))
    if cleaned := shown_of("cleaned"):
        shown.append(_cleaned(cleaned, seeds, each))
    return "\n\n".join(shown)


def _kinds(kinds: Iterable[str], each: Callable[..., str]) -> str:
    """What is found of each kind of noise."""
    columns = {
        "share": "share of the labels",
        "auroc": "AUROC against right labels",
        "mean_probability": "mean probability",
        "found_at_0.5": "probability of 0.5 and more",
        "suggested_right": "of these, suggested class right",
    }
    rows = [[kind, *(each("kinds", kind, name, form=".2f") for name in columns)] for kind in kinds]
    return table(["kind of noise", *columns.values()], rows)


def _cleaned(first: Mapping, seeds: Mapping, each: Callable[..., str]) -> str:
    """Labels before and after cleaning, and networks trained on both."""
    names = {
        "changed": "labels replaced",
        "changed_was_wrong": "of these, wrong before",
        "changed_is_right": "of these, right after",
        "wrong_before": "wrong labels before",
        "wrong_after": "wrong labels after",
    }
    rows = [
        [label, each("cleaned", "labels", name, form=".1f", factor=100)]
        for name, label in names.items()
    ]
    for group in ("held back", "other fold"):
        for name in first["folds"][0][f"before, {group}"]:
            pairs = [
                " to ".join(f"{fold[f'{when}, {group}'][name]:.1f}" for when in ("before", "after"))
                if fold
                else "–"
                for own in seeds.values()
                for fold in own.get("cleaned", {"folds": [None]})["folds"]
            ]
            rows.append([f"mIoU of {name}, {group}", ", ".join(pairs)])
    return table(["cleaned, in percent", ""], rows)


def parity(figures: Mapping) -> str:
    """The largest errors."""
    rows = [
        [name.replace("_", " "), f"{error:.1e}", f"{figures['tolerances'][name]:.0e}"]
        for name, error in figures["errors"].items()
    ]
    return table(["largest error of all networks", "", "tolerance"], rows)


TABLES: dict[str, Callable[[Mapping], str]] = {
    "sample": sample,
    "claims": claims,
    "claims_more_steps": claims,
    "claims_memorised": claims,
    "step": step,
    "input": input_,
    "end_to_end": end_to_end,
    "tpu": tpu,
    "gpu": gpu,
    "scaling": scaling,
    "processes": processes,
    "faults": faults,
    "mutants": mutants,
    "fuzz": fuzz,
    "maps": maps,
    "audit": audit,
    "audit_dfc2020": audit,
    "parity": parity,
}
# Of the first page, which has no captions: by name, the part and its table.
SHORT_TABLES = {
    "sample_in_short": ("sample", sample_in_short),
    "claims_in_short": ("claims", claims_in_short),
}


def caption(name: str, entry: Mapping) -> str:
    """The command that renews a table, and what its figures were measured on."""
    known = [f"`make bench ONLY={name}`", entry["date"], f"commit {entry['commit']}"]
    known.append(entry["processor"])
    known += [f"{package} {version}" for package, version in entry.get("versions", {}).items()]
    if "seconds" in entry:
        known.append(f"{entry['seconds']} s in all")
    return ", ".join(known) + "."


def block(name: str, results: Mapping[str, Mapping]) -> str:
    """Caption, table and note of a part."""
    if name not in results:
        return f"No figures yet: `make bench ONLY={name}`."
    entry = results[name]
    shown = [caption(name, entry)]
    if entry["figures"]:
        shown.append(TABLES[name](entry["figures"]))
    if "note" in entry:
        shown.append(entry["note"])
    return "\n\n".join(shown)


def blocks(results: Mapping[str, Mapping]) -> dict[str, str]:
    """All that is generated, by name: the list of parts and the tables.

    Args:
      results: results.json: by part, what `parts.measure` returns. An entry may have a `note`, text
        about the same measurement that goes when the part is measured anew.
    """
    listed = [
        [f"`{name}`", part.measures, part.takes, "yes" if part.by_default else ""]
        for name, part in parts.PARTS.items()
    ]
    found = {"parts": table(["part", "measures", "takes", "in `make bench`"], listed)}
    found |= {name: block(name, results) for name in parts.PARTS}
    found |= {name: make(results[part]["figures"]) for name, (part, make) in SHORT_TABLES.items()}
    return found


def rewrite(text: str, blocks: Mapping[str, str]) -> str:
    """A document with the text between its markers made anew.

    Raises:
      KeyError: there is no block of a marker's name.
    """
    return MARKED.sub(lambda found: f"{found[1]}\n{blocks[found[2]]}\n\n{found[3]}", text)
