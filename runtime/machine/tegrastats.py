"""What a Jetson says of itself while a model answers: memory, load, clocks, power and temperatures.

NVIDIA's `tegrastats` prints one line an interval ("Tegrastats Utility" in the Jetson Linux Developer Guide,
https://docs.nvidia.com/jetson/archives/r36.4/DeveloperGuide). What a line holds differs by board and release, so each
statistic is looked for by itself, and what is not known is passed over. Where there is no `tegrastats`, there are no figures.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from threading import Thread
from time import perf_counter
from typing import IO

PROGRAM = "tegrastats"
INTERVAL_MS = 100
# How long a model answers while the board is read: dozens of lines, whatever one answer takes.
SECONDS = 5.0
# How long the program may take to end before it is killed.
STOP_SECONDS = 2.0

# The rails that make up a board's whole input: Orin NX and Orin Nano, AGX Thor, AGX Orin. Other rails are parts of these.
TOTALS = (("VDD_IN",), ("VIN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
# What a sensor reads whose block is powered down.
SENSOR_OFF = -256.0
# The power chip's zone reads a constant, 50 or 100 by board.
NO_SENSOR = "PMIC"

MEMORY = r"\b{} (\d+)/(\d+)MB"
CPU = re.compile(r"\bCPU \[([^\]]*)\](?:@(\d+))?")
CORE = re.compile(r"(\d+)%(?:@(\d+))?")
# `0%`, `0%@2133`, `@4266`, `12%@[1300,1300]` (a clock for each cluster of the GPU), `@[1574,1574,1574]`.
LOAD = r"\b{}\s+(?:(\d+)\s*%)?(?:@(\[[^\]]*\]|\d+))?"
# `cpu@48.5C`; since Jetson Linux 39 `cpu@48.5C/52.1C`, with the highest so far.
TEMPERATURE = re.compile(r"\b([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C\b")
# `VDD_IN 5145mW/5110mW`, now and on average; before JetPack 5 without units, since Jetson Linux 39 with the highest as third.
RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (-?\d+)(?:mW)?/(-?\d+)(?:mW)?(?!\w)")


@dataclass(frozen=True)
class Load:
    """How busy a processor core, the GPU or the memory controller is.

    Attributes:
        percent: Of the time, or of the bandwidth, at the present clock; None if the line does not say.
        mhz: The clock, of several the fastest; None if the line does not say.
    """

    percent: int | None
    mhz: int | None


@dataclass(frozen=True)
class Rail:
    """The power of one supply, in mW: now, and on average since the program started."""

    now: int
    average: int


@dataclass(frozen=True)
class Reading:
    """One line.

    Attributes:
        ram: Used and total memory, in MB; processor and GPU share it.
        swap: Used and total swap, in MB; None without any.
        cores: The processor's cores; None for one that is off.
        memory_controller: None if the line does not say, as without root.
        gpu: AGX Thor's lines may hold the clocks alone.
        temperatures: Sensor to degrees Celsius; sensors that are off are left out.
        rails: Name to power.
    """

    ram: tuple[int, int]
    swap: tuple[int, int] | None
    cores: tuple[Load | None, ...]
    memory_controller: Load | None
    gpu: Load | None
    temperatures: Mapping[str, float]
    rails: Mapping[str, Rail]


@dataclass(frozen=True)
class Board:
    """A board's figures over a while of answering; None where the lines do not tell.

    Attributes:
        lines: Lines read.
        answers: Answers given meanwhile.
        seconds_per_answer: From one answer to the next.
        ram_peak_mb: Most memory in use, by everything on the board.
        ram_total_mb: Memory that the system has.
        swap_peak_mb: Most swap in use.
        gpu_load_mean: Percent.
        gpu_load_peak: Percent.
        gpu_mhz_mean: The GPU's clock.
        emc_mhz_mean: The memory's clock.
        power_rails: The rails that add up to the board's input.
        power_mean_w: Of their sum.
        power_peak_w: Of their sum.
        energy_per_answer_j: Mean power times `seconds_per_answer`; what the idle board takes is in it.
        temperature_peak_c: Of the hottest sensor.
        hottest_sensor: Its name.
    """

    lines: int
    answers: int
    seconds_per_answer: float
    ram_peak_mb: int
    ram_total_mb: int
    swap_peak_mb: int | None
    gpu_load_mean: float | None
    gpu_load_peak: float | None
    gpu_mhz_mean: float | None
    emc_mhz_mean: float | None
    power_rails: tuple[str, ...]
    power_mean_w: float | None
    power_peak_w: float | None
    energy_per_answer_j: float | None
    temperature_peak_c: float | None
    hottest_sensor: str | None


def available() -> bool:
    """Say whether this machine has `tegrastats`."""
    return shutil.which(PROGRAM) is not None


def power_mode() -> str | None:
    """Return the name of a Jetson's power mode, such as `MAXN_SUPER`, or None."""
    program = shutil.which("nvpmodel")
    if program is None:
        return None
    try:
        done = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"NV Power Mode:\s*(\S+)", done.stdout)
    return found[1] if found else None


def watch(answer: Callable[[], object], seconds: float = SECONDS) -> Board | None:
    """Answer over and over for a while, and return what `tegrastats` said of the board meanwhile.

    Args:
        answer: Gives one answer; called at least once.
        seconds: No answer begins later than this.

    Returns:
        None if there is no `tegrastats`, or if it said nothing.
    """
    with recording() as readings:
        if readings is None:
            return None
        answers, begun = 0, perf_counter()
        while not answers or perf_counter() - begun < seconds:
            answer()
            answers += 1
        spent = perf_counter() - begun
        return summarise(tuple(readings), answers, spent)


@contextmanager
def recording(interval_ms: int = INTERVAL_MS) -> Iterator[Sequence[Reading] | None]:
    """Run `tegrastats` for a while; the program has ended when the block has, however it ends.

    Yields:
        The readings, which grow until the block or the program ends; None if the program cannot be started.
    """
    program = shutil.which(PROGRAM)
    process = _start([program, "--interval", str(interval_ms)]) if program else None
    if process is None or process.stdout is None:
        yield None
        return
    readings: list[Reading] = []
    # A daemon, so that a pipe which some child of the program keeps open holds up nothing.
    reader = Thread(target=_read, args=(process.stdout, readings), daemon=True)
    try:
        reader.start()
        yield readings
    finally:
        _stop(process)
        reader.join(STOP_SECONDS)


def parse(line: str) -> Reading | None:
    """Return what a line of `tegrastats` says, or None if it is none."""
    ram = _memory("RAM", line)
    if ram is None:
        return None
    temperatures = {name: float(value) for name, value in TEMPERATURE.findall(line)}
    return Reading(
        ram=ram,
        swap=_memory("SWAP", line),
        cores=_cores(line),
        memory_controller=_load("EMC_FREQ", line),
        gpu=_load("GR3D_FREQ", line),
        temperatures={name: value for name, value in temperatures.items() if value > SENSOR_OFF},
        rails={name: Rail(int(now), int(average)) for name, now, average in RAIL.findall(line)},
    )


def summarise(readings: Sequence[Reading], answers: int, seconds: float) -> Board | None:
    """Sum up the readings of a while.

    Args:
        readings: In any order.
        answers: Answers given meanwhile.
        seconds: How long they took together.

    Returns:
        None without any reading.
    """
    if not readings:
        return None
    gpu = [reading.gpu for reading in readings if reading.gpu]
    loads = [load.percent for load in gpu if load.percent is not None]
    emc = [reading.memory_controller for reading in readings if reading.memory_controller]
    rails, watts = _power(readings)
    power = _mean(watts)
    hottest = max(
        ((value, name) for r in readings for name, value in r.temperatures.items() if name != NO_SENSOR),
        default=(None, None),
    )
    return Board(
        lines=len(readings),
        answers=answers,
        seconds_per_answer=seconds / answers,
        ram_peak_mb=max(reading.ram[0] for reading in readings),
        ram_total_mb=readings[0].ram[1],
        swap_peak_mb=max((reading.swap[0] for reading in readings if reading.swap), default=None),
        gpu_load_mean=_mean(loads),
        gpu_load_peak=max(loads, default=None),
        gpu_mhz_mean=_mean([load.mhz for load in gpu if load.mhz is not None]),
        emc_mhz_mean=_mean([load.mhz for load in emc if load.mhz is not None]),
        power_rails=rails,
        power_mean_w=power,
        power_peak_w=max(watts, default=None),
        energy_per_answer_j=None if power is None else power * seconds / answers,
        temperature_peak_c=hottest[0],
        hottest_sensor=hottest[1],
    )


def _start(command: Sequence[str]) -> subprocess.Popen[str] | None:
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    try:
        return subprocess.Popen(command, stdin=none, stdout=pipe, stderr=none, encoding="utf-8", errors="replace")
    except OSError:
        return None


def _read(stream: IO[str], readings: list[Reading]) -> None:
    """Parse lines until the program ends; a last one without its end was cut off, and is left out."""
    with stream:
        for line in stream:
            reading = parse(line) if line.endswith("\n") else None
            if reading is not None:
                readings.append(reading)


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _memory(name: str, line: str) -> tuple[int, int] | None:
    found = re.search(MEMORY.format(name), line)
    return (int(found[1]), int(found[2])) if found else None


def _cores(line: str) -> tuple[Load | None, ...]:
    """Read `CPU [2%@1510,off]`, or `CPU [2%,off]@1510` with one clock for all."""
    found = CPU.search(line)
    if found is None:
        return ()
    cores = (CORE.search(part) for part in found[1].split(","))
    return tuple(Load(int(core[1]), _number(core[2] or found[2])) if core else None for core in cores)


def _load(name: str, line: str) -> Load | None:
    found = re.search(LOAD.format(name), line)
    if found is None:
        return None
    percent, clocks = _number(found[1]), [int(clock) for clock in re.findall(r"\d+", found[2] or "")]
    return Load(percent, max(clocks, default=None)) if percent is not None or clocks else None


def _power(readings: Sequence[Reading]) -> tuple[tuple[str, ...], list[float]]:
    """Return the rails that add up to the board's input, and their sum in each reading that has them, in W."""
    for rails in TOTALS:
        having = [reading.rails for reading in readings if all(rail in reading.rails for rail in rails)]
        if having:
            return rails, [sum(found[rail].now for rail in rails) / 1000 for found in having]
    return (), []


def _number(digits: str | None) -> int | None:
    return int(digits) if digits else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
