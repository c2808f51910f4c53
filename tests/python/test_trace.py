"""Traces: the reader's formats and its complaints, scaling, and the trace that ships."""

from __future__ import annotations

from pathlib import Path

import pytest

import elastikv
from elastikv.trace import DEFAULT_TRACE, Outcome, TraceRequest, model_of, read_trace, scale_trace, summary
from elastikv.trace.generate import BURST_SECONDS, BURSTS, REQUESTS_PER_BURST, csv_lines, generate_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_seven_digits_of_a_second(tmp_path):
    path = write(
        tmp_path,
        HEADER + "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:18:03.9799601,110,27\n",
    )
    first, second, third = read_trace(path)
    assert first == TraceRequest(0.0, 4808, 10)
    assert (second.arrival, second.context_tokens, second.generated_tokens) == (0.052, 3180, 8)
    assert third.arrival == pytest.approx(60.0000001, abs=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "seconds"),
    [
        ("2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:01.009930+00:00", 1.0),
        ("2024-05-10T00:00:00", "2024-05-10T00:01:00.5", 60.5),
        ("2024-05-10 02:00:00+02:00", "2024-05-10 00:00:07+00:00", 7.0),
        ("2023-12-31 23:59:59.9999999", "2024-01-01 00:00:00.0000000", 1e-7),
        ("2024-05-10 00:00:00.123456789", "2024-05-10 00:00:00.123456790", 1e-9),
    ],
)
def test_reads_other_timestamps(tmp_path, first, second, seconds):
    path = write(tmp_path, HEADER + f"{first},1,1\n{second},1,1\n")
    assert read_trace(path)[1].arrival == pytest.approx(seconds, abs=1e-12)


def test_sorts_by_time_and_leaves_out_what_has_no_tokens(tmp_path):
    path = write(
        tmp_path,
        "\ufeffGeneratedTokens,Extra,TIMESTAMP,ContextTokens\n"
        "3,x,2024-01-01 00:00:09,30\n0,x,2024-01-01 00:00:01,10\n2,x,2024-01-01 00:00:04,20\n",
    )
    assert read_trace(path) == [TraceRequest(0.0, 20, 2), TraceRequest(5.0, 30, 3)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no column TIMESTAMP"),
        ("TIMESTAMP,ContextTokens\n2024-01-01 00:00:00,1\n", "no column GeneratedTokens"),
        (HEADER, "without requests"),
        (HEADER + "2024-01-01 00:00:00,0,5\n", "without requests"),
        (HEADER + "2024-01-01 00:00:00,1,1\nyesterday,1,1\n", "line 3"),
        (HEADER + "2024-01-01 00:00:00,many,1\n", "line 2"),
        (HEADER + "2024-01-01 00:00:00,-4,1\n", "line 2: -4 tokens"),
        (HEADER + "2024-01-01 00:00:00,4\n", "line 2"),
        (HEADER + "2024-01-01 00:00:00.,4,1\n", "line 2"),
    ],
)
def test_complains_with_file_and_line(tmp_path, text, complaint):
    path = write(tmp_path, text)
    with pytest.raises(elastikv.InvalidArgument, match=complaint) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "nothing.csv")


def test_scaling(tmp_path):
    requests = [TraceRequest(0.0, 1000, 10), TraceRequest(8.0, 3, 30), TraceRequest(9.0, 5, 5)]
    scaled = scale_trace(requests, time_scale=0.5, token_scale=0.1, max_requests=2)
    assert scaled == [TraceRequest(0.0, 100, 1), TraceRequest(4.0, 1, 3)]
    assert scale_trace(requests) == requests


@pytest.mark.parametrize(
    "wrong", [{"time_scale": 0}, {"token_scale": -1.0}, {"max_requests": 0}, {"time_scale": float("nan")}]
)
def test_scaling_refuses_nonsense(wrong):
    with pytest.raises(elastikv.InvalidArgument):
        scale_trace([TraceRequest(0.0, 1, 1)], **wrong)


def test_the_trace_that_ships_is_the_generators():
    assert DEFAULT_TRACE.read_text(encoding="utf-8") == "\n".join(csv_lines()) + "\n"
    assert list(generate_trace(1)) != list(generate_trace(2))


def test_the_trace_that_ships_comes_in_bursts():
    requests = read_trace(DEFAULT_TRACE)
    assert len(requests) == BURSTS * REQUESTS_PER_BURST
    bursts = [int(request.arrival / BURST_SECONDS) for request in requests]
    assert bursts == sorted(bursts) and set(bursts) == set(range(BURSTS))
    # Written and read again, the times are those that were generated, to the 100 ns that the format keeps.
    for request, (arrival, context, generated) in zip(requests, generate_trace()):
        assert request.arrival == pytest.approx(arrival, abs=1e-7)
        assert (request.context_tokens, request.generated_tokens) == (context, generated)


def test_models_are_busy_in_turn():
    models = [model_of(index, float(index), models=3, shift=10.0) for index in range(60)]
    for phase in range(6):
        own = models[10 * phase : 10 * phase + 10]
        assert own.count(phase % 3) >= 8 and len(own) == 10
    assert set(models[:20]) == {0, 1, 2}
    assert {model_of(index, 5.0, models=1, shift=1.0) for index in range(12)} == {0}
    for models, shift in ((0, 1.0), (3, 0.0), (3, float("nan"))):
        with pytest.raises(elastikv.InvalidArgument, match="above 0"):
            model_of(0, 0.0, models=models, shift=shift)


def test_what_became_of_a_trace():
    served = [Outcome(due=i / 10, first=i / 10 + 0.01 * i, end=10.0, tokens=5) for i in range(100)]
    facts = summary([*served, Outcome(20.0, None, None, 0)])
    assert (facts["requests"], facts["served"], facts["refused"], facts["waited"]) == (101, 100, 1, 0)
    assert facts["first_token_p50"] == pytest.approx(0.5) and facts["first_token_p99"] == pytest.approx(0.99)
    assert facts["tokens_per_second"] == pytest.approx(50.0)
    assert summary([])["first_token_p99"] == 0.0 and summary([Outcome(0, 2.0, 3.0, 1)])["waited"] == 1
