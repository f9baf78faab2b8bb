"""What a run costs, before it is started: parameters, bytes a device, FLOPs; nothing is allocated.

python -m launch.plan --config=configs/quickstart.py
"""

import collections
import os
from typing import Any

from absl import flags

from configs import base
from launch import command, keys
from lm import strict_json
from lm.errors import InputError

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Compile the train step for a TPU slice, as v5e:4x4; needs the extra tpu."
)
_SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "Try remat, micro-batches and meshes on --topology; list what fits, best first.",
)
_SEARCH_MINUTES = flags.DEFINE_float(
    "search_minutes", 10.0, "No candidate of --search is begun that would end after so long."
)
_KEYS = flags.DEFINE_bool("keys", False, "Print every key of a config, its default and meaning.")
_PREFIX = flags.DEFINE_string("prefix", "", "With --keys: only keys that begin so, as objective.")
_METHODS = flags.DEFINE_bool("methods", False, "Print the page docs/methods.md.")
_MARKDOWN = flags.DEFINE_bool("markdown", False, "With --keys: as the page docs/configs.md.")


def main() -> None:
    """Prints the plan, or the keys of a config."""
    if _KEYS.value:
        _print_keys()
        return
    if _METHODS.value:
        from launch import methods

        print(methods.as_markdown())
        return
    config = command.CONFIG.value
    _check_flags()
    if command.DEVICES.value:  # no need to wake the accelerators at hand
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if _TOPOLOGY.value:
        prepare_for_tpu()
    from launch import profile_table
    from lm.planning import ahead, plan
    from lm.training import experiment

    topology = None
    if _TOPOLOGY.value:
        topology = ahead.load_topology(_TOPOLOGY.value, command.SLICES.value)
    devices = topology.devices if topology else command.DEVICES.value
    vocab_size = plan.vocabulary(config.data)
    config = experiment.resolve(config)
    if _SEARCH.value:
        _search(config, vocab_size, topology)
        return
    run = experiment.build(config, vocab_size, devices)
    if command.PROFILE.value:
        profile_table.show(run, topology)
        return
    planned = plan.make_plan(run)
    interfaces = plan.compare_interfaces(config, vocab_size, planned.devices)
    widths = plan.compare_widths(run)
    _note_vocabulary(config.data)
    if not command.JSON.value:
        print("\n".join(_lines(config, planned, interfaces, widths)))
    compiled = None
    if topology:
        command.say(f"compiling the train step for {topology.name}; this may take minutes")
        compiled = ahead.compile_step(run, topology)
        if not command.JSON.value:
            print("\n".join(["", *_compiled_lines(topology, compiled)]))
    if command.JSON.value:
        record = plan.as_dict(planned)
        record |= {"interfaces": plan.as_dict(interfaces), "widths": plan.as_dict(widths)}
        if compiled:
            record["topology"] = _facts(topology)
            record["compiled"] = plan.as_dict(compiled)
        print(strict_json.dumps(record))


def _print_keys() -> None:
    found = keys.listed(_PREFIX.value)
    if not found:
        sections = {name.partition(".")[0]: None for name in base.meanings()}
        raise InputError(f"--prefix={_PREFIX.value}: no such key; sections: {', '.join(sections)}")
    if command.JSON.value:
        print(keys.as_json(found))
    else:
        print(keys.as_markdown(found) if _MARKDOWN.value else keys.as_text(found), end="\n")


def _check_flags() -> None:
    """Raises InputError for flags that do not go together."""
    if command.CONFIG.value is None:
        raise InputError("--config=FILE.py is missing, for example --config=configs/quickstart.py")
    if command.DEVICES.value is not None and _TOPOLOGY.value:
        raise InputError("--devices and --topology both say how many devices there are; give one")
    if command.DEVICES.value is not None and command.DEVICES.value < 1:
        raise InputError(f"--devices={command.DEVICES.value} must be at least 1")
    if _SEARCH.value and not _TOPOLOGY.value:
        raise InputError("--search needs --topology, for example --topology=v5e:4x4")
    if command.SLICES.value != 1 and not _TOPOLOGY.value:
        raise InputError("--slices needs --topology, which is that of one slice")
    if command.PROFILE.value and _SEARCH.value:
        raise InputError("--profile and --search are two questions; ask one")
    if _SEARCH_MINUTES.value <= 0:
        raise InputError(f"--search_minutes={_SEARCH_MINUTES.value} must be above 0")


def _search(config: Any, vocab_size: int, topology: Any) -> None:
    from lm.planning import ahead, layout_search, plan
    from lm.training import experiment

    def compile_step(changed):
        run = experiment.build(changed, vocab_size, topology.devices)
        return ahead.compile_step(run, topology)

    candidates = layout_search.propose(config, vocab_size, topology)
    minutes = _SEARCH_MINUTES.value
    command.say(f"{len(candidates)} candidates for {topology.name}, {minutes:g} minutes")
    found = layout_search.search(candidates, compile_step, 60 * minutes, command.say)
    if command.JSON.value:
        print(strict_json.dumps({"topology": _facts(topology), "search": plan.as_dict(found)}))
    elif not found:
        print(f"nothing that was tried fits on {topology.name}")
    else:
        print("\n".join(_found_lines(topology, found, layout_search.flags)))


def _found_lines(topology: Any, found: Any, flags_of: Any) -> list[str]:
    rows = []
    for one in found:
        e, memory = one.compilation.estimate, one.compilation.memory.total
        mfu = f"{e.sequential_mfu:.1%}", f"{e.overlapped_mfu:.1%}"
        rows.append([flags_of(one.changes), _size(memory), f"{memory / topology.memory:.0%}", *mfu])
    head = [f"fits on {topology.name}", "a chip", "of it", "MFU, nothing overlapped", "all"]
    return command.table(head, rows)


def _facts(topology: Any) -> dict[str, Any]:
    names = ("name", "chips", "memory", "peak_flops", "interconnect", "network", "slices")
    return {name: getattr(topology, name) for name in names}


def prepare_for_tpu() -> None:
    """Keeps libtpu from looking for TPUs, which it does when JAX is imported.

    Planning must neither take the chips of the machine that it runs on, nor ask a metadata server
    what machine this is, nor lock other processes out of libtpu.
    """
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    # Any valid value will do, and without one libtpu complains on standard error.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")


def _note_vocabulary(c: Any) -> None:
    """Says so when training would refuse a vocabulary that can be planned with."""
    from lm.data import tokenizers

    if c.tokenizer == "bpe":
        return
    try:
        tokenizers.load(c.tokenizer, c.vocab_size, (), directory=c.directory)
    except InputError as error:
        command.say(f"note: launch.train refuses this config: {error}")


def _lines(config: Any, p: Any, interfaces: Any, widths: Any) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in p.mesh.items())
    lines = [
        f"{p.devices:,} device{'s' * (p.devices > 1)}: {mesh}",
        f"vocabulary {p.vocab_size:,}",
        "",
        *command.table(
            ["parameters", "", "share"],
            [[name, f"{n:,}", f"{n / p.parameters.total:.1%}"] for name, n in _groups(p)],
        ),
        "",
        *command.table(
            ["train state", "in all", "a device"],
            [[name, _size(b.total), _size(b.per_device)] for name, b in p.bytes.items()],
        ),
        f"a checkpoint is {_size(p.checkpoint_bytes)} before compression",
    ]
    if p.unsharded:
        share = p.unsharded_parameters / p.parameters.total
        rows = [[x.name, " x ".join(map(str, x.shape)), _size(x.bytes)] for x in p.unsharded]
        lines.append(f"whole on every device: {share:.1%} of the parameters; the largest:")
        lines += ["  " + row for row in command.table(["", "", ""], rows)[1:]]
    return [
        *lines,
        "",
        f"tokens: {p.tokens_per_step:,} a step, {p.tokens:,} in {config.train.steps:,} steps",
        f"model FLOPs: {_count(p.flops_per_token)} a token, {_count(p.flops_per_step)} a step, "
        f"{_count(p.flops)} in all",
        "",
        *_interface_lines(config, interfaces),
        "",
        *_width_lines(config, widths),
    ]


def _groups(p: Any) -> list[tuple[str, int]]:
    return [*p.parameters.by_group.items(), ("total", p.parameters.total)]


def _interface_lines(config: Any, interfaces: Any) -> list[str]:
    rows = []
    for x in interfaces:
        mark = " *" if x.embedding == config.model.embedding else ""
        if not x.refused:
            sizes = [_size(x.bytes[part].total) for part in ("parameters", "optimizer", "state")]
            count = x.parameters.by_group.get("embedding", 0)
            rows.append([x.embedding + mark, f"{count:,}", f"{x.parameters.total:,}", *sizes])
    head = ["model.embedding", "its own", "parameters", "bytes", "optimizer", "train state"]
    refused = [f"{x.embedding}: not with this config: {x.refused}" for x in interfaces if x.refused]
    return [*command.table(head, rows), *refused]


def _width_lines(config: Any, widths: Any) -> list[str]:
    steps, rows = config.train.steps, []
    for x in widths:
        if x.refused:
            continue
        plan = config.quantization.widths
        own = x is widths[-1] if plan else x.bits == min(config.quantization.bits, 16)
        mark = " *" if own else ""
        planned = ["", "", f"{x.switch:,} to {steps:,}" if plan and x.switch is not None else ""]
        if x.tokens_per_byte is not None:
            optimal = f"{x.optimal_fraction:.3f}" if x.optimal_fraction else "none"
            planned = [f"{x.tokens_per_byte:.4g}", optimal]
            planned += [f"{x.switch:,} to {steps:,}" if x.switch is not None else ""]
        rows.append([f"{x.bits:g}{mark}", _size(x.bytes), *planned])
    name = config.quantization.quantizer
    head = ["bits", f"weights, {name}", "tokens a byte, S", "optimal fraction", "quantized steps"]
    return command.table(head, rows)


def _compiled_lines(topology: Any, c: Any) -> list[str]:
    options = " ".join(f"{name}={value}" for name, value in c.compiler_options.items())
    lines = [
        f"compiled for {topology.name}, {topology.chips:,} chips, in {c.seconds:.0f} s "
        f"({c.cpu_seconds:.0f} s of processors)",
        f"compiler options: {options or 'none beyond its defaults'}",
    ]
    if c.memory is None:
        return [*lines, f"does not fit: {c.refused}"]
    share = c.memory.total / topology.memory
    verdict = "fits" if c.fits else "does not fit"
    parts = c.memory._asdict().items()
    lines += [
        *command.table(["memory", "a device"], [[name, _size(value)] for name, value in parts]),
        f"{verdict}: {share:.1%} of {_size(topology.memory)}",
        "",
        f"FLOPs of a step on a device: {_count(c.model_flops)} by the formula, "
        f"{_count(c.counted_flops)} by XLA" + " (the body of a loop once)" * bool(c.loops),
    ]
    if c.loops:
        turns = collections.Counter(c.loops).items()
        lines.append("loops: " + ", ".join(f"{n} of {turn} turns" for turn, n in turns))
    lines += ["", *_estimate_lines(c.estimate), *_overlap_lines(c.overlap), ""]
    rows = [
        [kind, axes, f"{x.count:,}", _size(x.bytes), _size(x.received)]
        for kind, by_axes in c.collectives.items()
        for axes, x in by_axes.items()
    ]
    table = command.table(["collectives of a step", "over", "runs", "bytes", "received"], rows)
    return [*lines, *(table if rows else ["no collectives"])]


def _estimate_lines(e: Any) -> list[str]:
    if e is None:
        return ["no time estimate: XLA has given no instruction any cycles"]
    seconds = {
        "computation, by XLA's cycles": e.compute_seconds,
        "attention kernels, at least": e.kernel_seconds,
        "communication, at least": e.communication_seconds,
    }
    rows = [[name, f"{value:.4g} s"] for name, value in seconds.items() if value]
    return [
        *command.table(["estimate of a step", ""], rows),
        f"MFU {e.overlapped_mfu:.1%} if all communication is overlapped, "
        f"{e.sequential_mfu:.1%} if none is",
    ]


def _overlap_lines(o: Any) -> list[str]:
    if not o.count:
        return []
    return [
        f"in the compiler's schedule {o.asynchronous:,} of {o.count:,} collectives are "
        f"asynchronous, and {o.covered:.4g} of {o.seconds:.4g} s of communication lie beside "
        "computation"
    ]


def _size(count: int) -> str:
    """Bytes in binary units."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _count(number: float) -> str:
    """A number in full below a million, else with four digits."""
    return f"{number:,.0f}" if number < 1e6 else f"{number:.3e}"


if __name__ == "__main__":
    command.run(main)
