"""What a Jetson says of itself, read from lines in the format of several JetPack releases and from a stand-in for the program.

The statistics and their forms are those of "Tegrastats Utility" in NVIDIA's Jetson Linux Developer Guide, releases 35.4.1,
36.4, 38.4 and 39.2 (AT/JetsonLinuxDevelopmentTools/TegrastatsUtility.html under
https://docs.nvidia.com/jetson/archives/r36.4/DeveloperGuide), and of its appendix on tegrastats in release 32.5. The guide
writes a block's power as `VDD_IN 3000/3000`; that lines carry a unit, since release 39 a highest value after `/`, and on some
boards a sensor at -256 is known from recordings that others published. The values here are made up.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from leanvlm.runtime.commands import profile
from leanvlm.runtime.commands.profile import ProfileConfig, measure
from leanvlm.runtime.commands.profile_report import page, print_table
from leanvlm.runtime.machine import tegrastats
from leanvlm.runtime.machine.tegrastats import Board, Load, Rail, Reading, parse, power_mode, recording, summarise, watch

JETPACK_4 = (
    "RAM 1830/3964MB (lfb 213x4MB) SWAP 12/1982MB (cached 1MB) IRAM 0/252kB(lfb 252kB) CPU [21%,off,3%,off]@1479 "
    "EMC_FREQ 4%@1600 GR3D_FREQ 61%@921 APE 25 PLL@38C CPU@41.5C PMIC@100C GPU@39.5C AO@46C thermal@40.25C "
    "POM_5V_IN 4120/3870 POM_5V_GPU 640/512"
)
XAVIER_NX_JETPACK_5 = (
    "03-14-2024 09:26:53 RAM 2954/6854MB (lfb 5x4MB) SWAP 0/3427MB (cached 0MB) CPU [12%@1420,7%@1190,0%@1190,3%@1420,off,off] "
    "EMC_FREQ 9%@1600 GR3D_FREQ 74%@[803] VIC_FREQ 115 APE 150 AUX@41C CPU@43.5C thermal@42.65C AO@41C GPU@44.5C PMIC@50C "
    "VDD_IN 6412mW/5230mW VDD_CPU_GPU_CV 2210mW/1480mW VDD_SOC 1105mW/1043mW"
)
ORIN_NANO_JETPACK_6 = (
    "02-11-2025 17:40:05 RAM 3310/7620MB (lfb 6x4MB) SWAP 41/3810MB (cached 2MB) "
    "CPU [17%@1728,4%@1344,0%@1344,9%@1728,2%@729,off] EMC_FREQ 31%@3199 GR3D_FREQ 98%@[1020] "
    "NVDEC off NVJPG off NVJPG1 off VIC off OFA off APE 200 "
    "cpu@52.281C soc2@50.125C soc0@51.031C gpu@53.75C tj@53.75C soc1@50.906C "
    "VDD_IN 15240mW/11873mW VDD_CPU_GPU_CV 7310mW/5012mW VDD_SOC 2870mW/2755mW"
)
ORIN_NX_WITHOUT_ROOT = (
    "06-30-2025 08:01:44 RAM 5120/15656MB (lfb 9x4MB) SWAP 0/7828MB (cached 0MB) CPU [5%@729,1%@729] GR3D_FREQ 37% "
    "cpu@48C gpu@47.437C tj@48C VDD_IN 7716mW/7204mW VDD_CPU_GPU_CV 1850mW/1402mW VDD_SOC 1930mW/1888mW"
)
AGX_ORIN_JETPACK_6 = (
    "05-02-2025 12:00:01 RAM 21877/62841MB (lfb 402x4MB) SWAP 0/31420MB (cached 0MB) CPU [14%@2201,6%@2112] EMC_FREQ 22%@3199 "
    "GR3D_FREQ 83%@[1300,1185] NVENC off NVDEC off VIC_FREQ 729 APE 174 CV0@-256C CPU@55.812C Tboard@41C "
    "SOC2@50.562C Tdiode@43.5C GPU@57.25C tj@57.25C CV2@-256C VDD_GPU_SOC 14806mW/9103mW VDD_CPU_CV 2811mW/1990mW "
    "VIN_SYS_5V0 6034mW/5120mW NC 0mW/0mW VDDQ_VDD2_1V8AO 1206mW/904mW NC 0mW/0mW"
)
AGX_ORIN_JETPACK_7 = (
    "08-19-2026 10:31:59 RAM 19020/62817MB (lfb 2x2MB) CPU [23%@2201,11%@2201] EMC_FREQ 3%@3199 GR3D_FREQ 12%@[1300,1300] "
    "NVENC0 off PVA0_FREQ off APE 174 cpu@52.968C/55.406C soc2@48.25C/49.5C gpu@47.625C/51.187C "
    "VDD_GPU_SOC 5139mW/5012mW/15370mW VDD_CPU_CV 3268mW/3105mW/7810mW VIN_SYS_5V0 5500mW/5430mW/7244mW"
)
AGX_THOR_JETPACK_7 = (
    "09-30-2025 20:15:30 RAM 31877/125772MB (lfb 33x4MB) CPU [9%@2601,off,7%@2601] EMC_FREQ 2%@4266 "
    "GR3D_FREQ @[1575,1560,1575] NVENC0_FREQ @1692 VIC off APE 300 cpu@50.75C tj@61.5C soc012@52C soc345@50.031C gpu@61.5C "
    "VDD_GPU -392mW/4310mW VDD_CPU_SOC_MSS 9012mW/7844mW VIN_SYS_5V0 7240mW/7101mW VIN 41055mW/33900mW"
)


def test_jetpack_4_and_the_appendix_of_release_32() -> None:
    """One clock for all cores, and power without units."""
    assert parse(JETPACK_4) == Reading(
        ram=(1830, 3964),
        swap=(12, 1982),
        cores=(Load(21, 1479), None, Load(3, 1479), None),
        memory_controller=Load(4, 1600),
        gpu=Load(61, 921),
        temperatures={"PLL": 38, "CPU": 41.5, "PMIC": 100, "GPU": 39.5, "AO": 46, "thermal": 40.25},
        rails={"POM_5V_IN": Rail(4120, 3870), "POM_5V_GPU": Rail(640, 512)},
    )


def test_jetpack_5() -> None:
    found = parse(XAVIER_NX_JETPACK_5)
    assert found is not None
    assert found.cores == (Load(12, 1420), Load(7, 1190), Load(0, 1190), Load(3, 1420), None, None)
    assert (found.ram, found.swap, found.gpu) == ((2954, 6854), (0, 3427), Load(74, 803))
    assert found.rails["VDD_IN"] == Rail(6412, 5230)


def test_jetpack_6() -> None:
    assert parse(ORIN_NANO_JETPACK_6) == Reading(
        ram=(3310, 7620),
        swap=(41, 3810),
        cores=(Load(17, 1728), Load(4, 1344), Load(0, 1344), Load(9, 1728), Load(2, 729), None),
        memory_controller=Load(31, 3199),
        gpu=Load(98, 1020),
        temperatures={"cpu": 52.281, "soc2": 50.125, "soc0": 51.031, "gpu": 53.75, "tj": 53.75, "soc1": 50.906},
        rails={"VDD_IN": Rail(15240, 11873), "VDD_CPU_GPU_CV": Rail(7310, 5012), "VDD_SOC": Rail(2870, 2755)},
    )


def test_without_root_some_statistics_are_missing() -> None:
    found = parse(ORIN_NX_WITHOUT_ROOT)
    assert found is not None
    assert (found.memory_controller, found.gpu) == (None, Load(37, None))


def test_two_clusters_sensors_that_are_off_and_unconnected_rails() -> None:
    found = parse(AGX_ORIN_JETPACK_6)
    assert found is not None
    assert found.gpu == Load(83, 1300)
    assert set(found.temperatures) == {"CPU", "Tboard", "SOC2", "Tdiode", "GPU", "tj"}
    assert found.rails["VDDQ_VDD2_1V8AO"] == Rail(1206, 904)


def test_jetpack_7_on_orin() -> None:
    """Power has a third value, temperatures a second, and there may be no swap."""
    found = parse(AGX_ORIN_JETPACK_7)
    assert found is not None
    assert (found.swap, found.gpu) == (None, Load(12, 1300))
    assert found.temperatures == {"cpu": 52.968, "soc2": 48.25, "gpu": 47.625}
    assert found.rails == {
        "VDD_GPU_SOC": Rail(5139, 5012),
        "VDD_CPU_CV": Rail(3268, 3105),
        "VIN_SYS_5V0": Rail(5500, 5430),
    }


def test_jetpack_7_on_thor() -> None:
    """Three clusters with clocks and no load; a rail near zero may read below it."""
    found = parse(AGX_THOR_JETPACK_7)
    assert found is not None
    assert found.cores == (Load(9, 2601), None, Load(7, 2601))
    assert found.gpu == Load(None, 1575)
    assert found.rails["VDD_GPU"] == Rail(-392, 4310)
    assert found.rails["VIN"] == Rail(41055, 33900)


@pytest.mark.parametrize(
    ("statistic", "expected"),
    [
        ("GR3D_FREQ 7%", Load(7, None)),
        ("GR3D_FREQ 0%@0", Load(0, 0)),
        ("GR3D_FREQ @612", Load(None, 612)),
        ("GR3D_FREQ @[300,off,600]", Load(None, 600)),
        ("GR3D_FREQ 20 %@[0, 300]", Load(20, 300)),
        ("GR3D_FREQ off", None),
        ("GR3D2_FREQ 5%@114", None),
        ("NEW_FREQ 5%@114 FUTURE what X@Y", None),
    ],
)
def test_forms_of_the_gpu_and_what_is_not_known(statistic: str, expected: Load | None) -> None:
    found = parse(f"RAM 1/2MB {statistic}")
    assert found == Reading((1, 2), None, (), None, expected, {}, {})


@pytest.mark.parametrize("line", ["", "\n", "command not found", "IRAM 0/252kB(lfb 252kB)", "RAM 2048/76", "RAM x/yMB", "\0"])
def test_other_lines_are_none(line: str) -> None:
    assert parse(line) is None


def read(*lines: str) -> list[Reading]:
    return [reading for line in lines if (reading := parse(line))]


def test_a_summary() -> None:
    busier = ORIN_NANO_JETPACK_6.replace("RAM 3310", "RAM 4020").replace("98%@[1020]", "60%@[306]").replace("15240mW", "9760mW")
    assert summarise(read(ORIN_NANO_JETPACK_6, busier), answers=4, seconds=2.0) == Board(
        lines=2,
        answers=4,
        seconds_per_answer=0.5,
        ram_peak_mb=4020,
        ram_total_mb=7620,
        swap_peak_mb=41,
        gpu_load_mean=79,
        gpu_load_peak=98,
        gpu_mhz_mean=663,
        emc_mhz_mean=3199,
        power_rails=("VDD_IN",),
        power_mean_w=12.5,
        power_peak_w=15.24,
        energy_per_answer_j=6.25,
        temperature_peak_c=53.75,
        hottest_sensor="tj",
    )


@pytest.mark.parametrize(
    ("line", "rails", "watts"),
    [
        (ORIN_NX_WITHOUT_ROOT, ("VDD_IN",), 7.716),
        (AGX_ORIN_JETPACK_6, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 23.651),
        (AGX_ORIN_JETPACK_7, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 13.907),
        (AGX_THOR_JETPACK_7, ("VIN",), 41.055),
        (JETPACK_4, (), None),
    ],
    ids=["Orin NX", "AGX Orin", "AGX Orin, JetPack 7", "AGX Thor", "a board whose total is not known"],
)
def test_the_power_of_the_board(line: str, rails: tuple[str, ...], watts: float | None) -> None:
    found = summarise(read(line), 1, 1.0)
    assert found is not None
    assert found.power_rails == rails
    assert found.power_mean_w == found.energy_per_answer_j == (None if watts is None else pytest.approx(watts))


def test_the_power_chip_is_no_sensor() -> None:
    found = summarise(read(JETPACK_4), 1, 1.0)
    assert found is not None
    assert (found.hottest_sensor, found.temperature_peak_c) == ("AO", 46)


def test_what_the_lines_do_not_tell_is_none() -> None:
    assert summarise(read("RAM 1/2MB"), 1, 1.0) == Board(
        1, 1, 1.0, 1, 2, None, None, None, None, None, (), None, None, None, None, None
    )
    assert summarise([], 1, 1.0) is None


Program = Callable[[str], Path]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """A function that puts a shell script named `tegrastats` on the PATH; the file it returns gets the script's process id."""

    def install(script: str) -> Path:
        pid = tmp_path / "pid"
        file = tmp_path / "tegrastats"
        file.write_text(f'#!/bin/sh\necho $$ > "{pid}"\n{script}\n', encoding="utf-8")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return pid

    return install


def lasting(line: str) -> str:
    """A script that prints a line again and again, with noise between."""
    return f"while :; do echo '{line}'; echo noise; sleep 0.01; done"


def wait_for(readings: Any, count: int) -> None:
    limit = time.monotonic() + 20
    while len(readings) < count:
        assert time.monotonic() < limit
        time.sleep(0.005)


def is_gone(pid: Path) -> bool:
    try:
        os.kill(int(pid.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_a_recording_ends_with_its_block(program: Program, tmp_path: Path) -> None:
    pid = program(f'echo "$@" > "{tmp_path / "arguments"}"\n{lasting(ORIN_NANO_JETPACK_6)}')
    with recording(interval_ms=250) as readings:
        assert readings is not None
        wait_for(readings, 3)
        assert not is_gone(pid)
    assert is_gone(pid)
    assert set(map(str, readings)) == {str(parse(ORIN_NANO_JETPACK_6))}
    assert (tmp_path / "arguments").read_text() == "--interval 250\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_recording_ends_with_an_error(program: Program, error: type[BaseException]) -> None:
    pid = program(lasting(ORIN_NANO_JETPACK_6))

    def interrupted() -> None:
        with recording() as readings:
            wait_for(readings, 1)
            raise error

    with pytest.raises(error):
        interrupted()
    assert is_gone(pid)


def test_a_program_that_does_not_want_to_end_is_killed(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tegrastats, "STOP_SECONDS", 0.1)
    pid = program(f"trap '' TERM\n{lasting(ORIN_NANO_JETPACK_6)}")
    with recording() as readings:
        wait_for(readings, 1)
    assert is_gone(pid)


def test_a_program_that_dies_leaves_what_it_said(program: Program) -> None:
    """Its last line is cut off in the middle of a number."""
    pid = program(f"echo '{AGX_ORIN_JETPACK_6}'\nprintf 'RAM 9/9MB VIN 41'\nexit 1")
    with recording() as readings:
        assert readings is not None
        wait_for(readings, 1)
        time.sleep(0.05)
    assert readings == read(AGX_ORIN_JETPACK_6)
    assert is_gone(pid)


def test_without_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with recording() as readings:
        assert readings is None
    assert not tegrastats.available()
    assert watch(lambda: pytest.fail("nothing is measured without the program")) is None
    assert power_mode() is None


def test_a_program_that_cannot_be_started(program: Program, tmp_path: Path) -> None:
    program("")
    (tmp_path / "tegrastats").write_text("#!/no/such/interpreter\n", encoding="utf-8")
    with recording() as readings:
        assert readings is None


def test_watching_answers_for_a_while(program: Program) -> None:
    pid = program(lasting(AGX_THOR_JETPACK_7))
    found = watch(partial(time.sleep, 0.02), seconds=0.3)
    assert found is not None
    assert is_gone(pid)
    assert found.lines > 1
    assert found.answers > 1
    assert 0.3 <= found.answers * found.seconds_per_answer < 5
    assert found.energy_per_answer_j == pytest.approx(41.055 * found.seconds_per_answer)


def test_watching_gives_one_answer_at_least(program: Program) -> None:
    program("exit 1")
    answers: Iterator[int] = iter(range(3))
    assert watch(partial(next, answers), seconds=0.0) is None
    assert next(answers) == 1


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVPM WARN: fan mode is not set!'; echo 'NV Power Mode: MAXN_SUPER'; echo 2", "MAXN_SUPER"),
        ("echo 'NV Power Mode:15W'; echo 1", "15W"),
        ("exit 1", None),
    ],
)
def test_the_power_mode(script: str, expected: str | None, program: Program, tmp_path: Path) -> None:
    program(f'[ "$1" = -q ] || exit 1\n{script}')
    (tmp_path / "tegrastats").rename(tmp_path / "nvpmodel")
    assert power_mode() == expected


def test_a_profile_on_a_jetson(
    program: Program, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The board's figures are in the JSON, the table and the page; without `tegrastats` there is no trace of them."""
    monkeypatch.setattr(profile, "peak_memory", lambda config, budget: {"resident": 1, "device": None})
    monkeypatch.setattr(tegrastats, "watch", partial(watch, seconds=0.2))
    config = ProfileConfig(demo_bundle, runs=1, warmup=0, max_new_tokens=2)

    plain = measure(config)
    print_table(plain)
    assert "board" not in json.dumps(plain) + capsys.readouterr().out + page(plain).casefold()

    program(lasting(ORIN_NANO_JETPACK_6))
    (tmp_path / "nvpmodel").write_text("#!/bin/sh\necho 'NV Power Mode: MAXN_SUPER'\n", encoding="utf-8")
    (tmp_path / "nvpmodel").chmod(0o755)
    figures = json.loads(json.dumps(measure(config)))
    assert figures["power_mode"] == "MAXN_SUPER"
    assert set(figures) == {*plain, "power_mode"}
    for key, values in figures["budgets"].items():
        board = values.pop("board")
        assert set(values) == set(plain["budgets"][key])
        assert (board["ram_peak_mb"], board["power_mean_w"], board["power_rails"]) == (3310, pytest.approx(15.24), ["VDD_IN"])
        assert board["energy_per_answer_j"] == pytest.approx(15.24 * board["seconds_per_answer"])
        values["board"] = board

    print_table(figures)
    printed, written = capsys.readouterr().out, page(figures)
    assert "board: energy per answer, J" in printed
    assert "power mode MAXN_SUPER" in printed
    assert all(text in printed and text in written for text in ("3310 of 7620", "15.2 (15.2)", "98 (98)", "53.8 (tj)"))
