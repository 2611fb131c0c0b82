"""
CTranslate2's stand-in on cards, against the real one on the CPU, and its arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fakes import GIB, ONE_CARD, TWO_CARDS_SWAPPED, FakeGpus, needs_linux
from real import TEXT, micro, micro_copy
from standin import (
    ILLEGAL_ACCESS,
    NO_CUBLAS,
    OUT_OF_MEMORY,
    CardMemory,
    run_on_cards,
)

from whispercache.engine.sizes.header import read_header
from whispercache.engine.sizes.weights import output_copy_bytes, weights_bytes

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [needs_linux, pytest.mark.process]


@pytest.fixture
def memory(gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> CardMemory:
    """
    A card of 8 GiB, of which others hold 1 GiB.
    """
    gpus.set_state(ONE_CARD)
    monkeypatch.setenv("FAKE_GPU_STATE", str(gpus.folder / "state"))
    return CardMemory(0)


class TestCardMemory:
    """
    The file that says what this process holds of a card.
    """

    def test_what_is_freed_stays_reserved_until_the_card_is_waited_for(
        self, memory: CardMemory, gpus: FakeGpus
    ) -> None:
        """
        The bytes leave the pool with the next synchronise; the peak stays.
        """
        memory.start_context(300)
        memory.take(1000)
        memory.give_back(600)
        freed = gpus.held(0)
        memory.synchronize()
        waited = gpus.held(0)
        assert freed == {
            "context": 300,
            "used": 400,
            "reserved": 1000,
            "peak": 1000,
            "threshold": 0,
        }
        assert waited == {**freed, "reserved": 400}

    def test_idle_bytes_are_used_before_the_pool_grows(
        self, memory: CardMemory
    ) -> None:
        """
        An allocation into what was freed takes nothing of the card.
        """
        memory.take(1000)
        memory.give_back(1000)
        memory.take(400)
        assert memory.books().reserved == 1000
        memory.take(800)
        assert memory.books().reserved == memory.books().peak == 1200

    def test_a_threshold_keeps_bytes_in_the_pool(
        self, memory: CardMemory, gpus: FakeGpus
    ) -> None:
        """
        What another library asked the pool to keep stays reserved.
        """
        gpus.hold(0, threshold=700)
        memory.take(1000)
        memory.give_back(1000)
        memory.synchronize()
        assert (memory.books().used, memory.books().reserved) == (0, 700)

    def test_a_card_that_is_full_gives_no_more(self, memory: CardMemory) -> None:
        """
        Context, reserved bytes and other tenants count; a refusal changes nothing.
        """
        memory.start_context(1 * GIB)
        memory.take(5 * GIB)
        before = memory.books()
        with pytest.raises(RuntimeError, match=OUT_OF_MEMORY):
            memory.take(1 * GIB + 1)
        assert memory.books() == before
        memory.take(1 * GIB)
        with pytest.raises(RuntimeError, match=OUT_OF_MEMORY):
            memory.grow_context(1)

    def test_a_caching_allocator_never_gives_back(self, memory: CardMemory) -> None:
        """
        Without the pool, bytes come out of the context and are used again.
        """
        cached = CardMemory(0, has_pool=False)
        cached.take(1000)
        cached.give_back(1000)
        cached.synchronize()
        cached.take(1200)
        books = memory.books()
        assert (books.context, books.used, books.reserved) == (1200, 0, 0)


def test_a_model_on_a_card_answers_as_on_the_cpu(gpus: FakeGpus) -> None:
    """
    The text through faster-whisper is the same, and the card is charged to the byte.

    Weights are, the padded copy of the output layer from the first call on, handles
    until the model is dropped, and kernels of the first encode for ever.
    """
    gpus.set_state(TWO_CARDS_SWAPPED)
    answer = run_on_cards(
        gpus,
        """
        import threading, numpy as np, ctranslate2
        from faster_whisper import WhisperModel

        def held(n=0):
            found = standin.books(n)
            return [found.context, found.used, found.reserved]

        model = WhisperModel(os.environ["MODEL"], "cuda", 1, "float16")
        loaded = held(1)
        silence = np.zeros(16_000, np.float32)
        text = "".join(s.text for s in model.transcribe(silence)[0])
        transcribed, peak = held(1), standin.books(1).peak
        card = model.model
        told = [card.device, card.device_index, card.compute_type, card.n_mels]
        while card.model_is_loaded:
            card.unload_model()
        unloaded = held(1)
        def drop():
            global model, card
            del model, card
        dropper = threading.Thread(target=drop, name="dropper")
        dropper.start(); dropper.join()
        on_cpu = WhisperModel(os.environ["MODEL"], "cpu", compute_type="float32")
        counts = ctranslate2.get_cuda_device_count()
        types = sorted(ctranslate2.get_supported_compute_types("cuda", 1))
        answer = {
            "text": text, "told": told, "types": types, "counts": counts,
            "held": [loaded, transcribed, unloaded, held(1), held(0)], "peak": peak,
            "first": standin.CALLS[0], "last": standin.CALLS[-1],
            "again": on_cpu.model.device,
            "read": reading("cuda:1"),
        }
        """,
        conduct={"context_bytes": 200, "kernels_bytes": 30, "handles_bytes": 4},
        MODEL=str(micro()),
    )
    assert isinstance(answer, dict)
    header = read_header(micro())
    weights = weights_bytes(header, "float16", "cuda:0")
    pad = output_copy_bytes(header.architecture, "float16")
    assert pad > 0
    assert answer["text"] == TEXT
    assert answer["told"] == ["cuda", [1], "float16", 80]
    assert "int8_float16" in answer["types"]
    assert "int16" not in answer["types"]
    assert answer["counts"] == 2
    loaded, transcribed, *rest = answer["held"]
    assert loaded == [200, weights, weights]
    assert transcribed[:2] == [234, weights + pad]
    assert transcribed[2] == answer["peak"] > weights + pad
    assert rest == [[234, 0, 0], [230, 0, 0], [0, 0, 0]]
    assert answer["first"] == ["build", "MainThread"]
    assert answer["last"] == ["drop", "dropper"]
    assert answer["again"] == "cpu"
    assert answer["read"] == [8 * GIB, 7 * GIB - 230, "nvml"]


_COMPARED = """
import numpy as np, time, ctranslate2

features = ctranslate2.StorageView.from_array(np.zeros((1, 80, 3000), np.float32))

def tried(call):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return [type(error).__name__, str(error)]
    return "fine"

def unload(model, **options):
    while model.model_is_loaded:
        model.unload_model(**options)
        time.sleep(0.0002)

def settle(model):
    while model.num_active_batches:
        time.sleep(0.0002)
    return model

def uses(model, encoded):
    return [
        tried(lambda: model.encode(features)),
        tried(lambda: model.generate(encoded, [[1]])),
        tried(lambda: model.detect_language(encoded)),
        tried(lambda: model.align(encoded, [1], [[1]], [100])),
        *(
            tried(lambda: getattr(model, name))
            for name in ("compute_type", "n_mels", "is_multilingual", "num_languages")
        ),
        settle(model).num_queued_batches, model.num_workers,
    ]
"""


def test_an_unloaded_model_fails_on_a_card_as_on_the_cpu(
    gpus: FakeGpus, tmp_path: Path
) -> None:
    """
    Types and texts of all errors are the real ones: after an unload, of a second one,
    of a load of files that are gone or too short, and of nonsense at construction.
    """
    gpus.set_state(ONE_CARD)
    answer = run_on_cards(
        gpus,
        _COMPARED
        + """
path = os.environ["MODEL"]

def life(device, compute_type):
    def make(**options):
        return ctranslate2.models.Whisper(path, device, **options)
    model = make(compute_type=compute_type)
    encoded = model.encode(features)
    model.load_model()
    said = [model.model_is_loaded]
    unload(model)
    model.unload_model()
    said += [model.model_is_loaded, uses(model, encoded)]
    os.rename(path + "/model.bin", path + "/gone")
    said += [tried(model.load_model), tried(make), model.model_is_loaded]
    with open(path + "/gone", "rb") as whole, open(path + "/model.bin", "wb") as part:
        part.write(whole.read(1000))
    said += [tried(model.load_model), model.model_is_loaded]
    os.replace(path + "/gone", path + "/model.bin")
    said += [tried(lambda: make(compute_type="int16"))]
    said += [tried(lambda: make(compute_type="nonsense"))]
    said += [tried(model.load_model), model.model_is_loaded, tried(model.load_model)]
    said += [tried(lambda: model.detect_language(encoded))]
    return said

answer = [life("cpu", "float32"), life("cuda", "float16"), standin.books().used]
""",
        MODEL=str(micro_copy(tmp_path / "model")),
    )
    assert isinstance(answer, list)
    on_cpu, on_card, used_bytes = answer
    assert on_card == on_cpu
    assert "No model replica" in on_cpu[2][0][1]
    assert "was unloaded" in on_cpu[2][1][1]
    assert used_bytes == 0


def test_copies_on_the_host_come_and_go_as_in_ctranslate2(
    gpus: FakeGpus, tmp_path: Path
) -> None:
    """
    One is made by the first unload to the host, read as often as it is kept, and needs
    no files; a plain unload drops it, and then files are read again. Each worker has a
    copy of its own, on the card too, where files are loaded once for all.
    """
    gpus.set_state(ONE_CARD)
    answer = run_on_cards(
        gpus,
        _COMPARED
        + """
path = os.environ["MODEL"]
model = ctranslate2.models.Whisper(path, "cuda", compute_type="int8", inter_threads=2)
model.load_model(keep_cache=True)
used = [standin.books().used]

unload(model, to_cpu=True)
model.unload_model(to_cpu=True)
encoded = ctranslate2.StorageView.from_array(np.zeros((1, 1500, 32), np.float32))
refused = tried(lambda: model.encode(features)), tried(lambda: model.align(encoded))
os.rename(path + "/model.bin", path + "/gone")
for keep in True, False:
    model.load_model(keep_cache=keep)
    used.append(standin.books().used)
    said = tried(lambda: model.detect_language(model.encode(features)))
    unload(settle(model), to_cpu=keep)
    used.append(standin.books().used)
answer = {"used": used, "said": said, "refused": refused}
answer["without"] = tried(model.load_model)
os.rename(path + "/gone", path + "/model.bin")
model.load_model()
unload(model, to_cpu=True)
model.unload_model()
os.unlink(path + "/model.bin")
answer["dropped"] = tried(model.load_model)
answer["calls"] = [
    call for call, _ in standin.CALLS if call not in ("encode", "detect_language")
    and "refused" not in call
]
""",
        conduct={"pad_bytes": 7},
        MODEL=str(micro_copy(tmp_path / "model")),
    )
    assert isinstance(answer, dict)
    weights = weights_bytes(read_header(micro()), "int8_float16", "cuda:0")
    assert answer["used"] == [weights, 2 * weights, 0, 2 * weights, 0]
    assert answer["said"] == "fine"
    assert answer["refused"][0][1] == "No model replica is available in this thread"
    assert answer["refused"][1][1] == "The model for this translator was unloaded"
    assert "Unable to open file" in answer["without"][1]
    assert answer["dropped"] == answer["without"]
    assert answer["calls"] == [
        *("build", "unload to_cpu", "load copy", "unload to_cpu"),
        *("load copy", "drop copy", "unload", "load"),
        *("load", "unload to_cpu", "drop copy", "load"),
    ]


def test_a_card_misbehaves_as_it_is_told(gpus: FakeGpus) -> None:
    """
    Each knob leads to its fault, and a broken context stays broken.
    """
    gpus.set_state(ONE_CARD)
    answer = run_on_cards(
        gpus,
        _COMPARED
        + """
def make():
    return ctranslate2.models.Whisper(os.environ["MODEL"], "cuda", compute_type="int8")

def used():
    return standin.books().used

answer = {}
answer["full"] = tried(make), used()
model = make()
model.unload_model(), model.unload_model()
answer["stubborn"] = model.model_is_loaded, standin.CALLS[-1][0]
model.unload_model()
answer["leak"] = model.model_is_loaded, used()
model.load_model()
answer["cublas"] = tried(lambda: model.encode(features))
standin.behave(cublas="looked for", copies_fail=True, leaks_bytes=0)
try:
    settle(model).unload_model(to_cpu=True)
except MemoryError as error:
    answer["copy"] = str(error), model.model_is_loaded, used()
model.load_model()
answer["detached"] = tried(lambda: model.generate(features, [[1]]))
unload(model)
model.load_model()
answer["whole"] = tried(lambda: model.n_mels)
standin.behave(cublas="there", jit_s=0.05)
start_s = time.monotonic()
model.encode(features)
answer["jit_s"] = time.monotonic() - start_s
answer["illegal"] = tried(lambda: model.encode(features)), tried(make)
before = used()
unload(settle(model))
answer["broken"] = used() == before
""",
        conduct={
            "stubborn": 2,
            "leaks_bytes": 10,
            "cublas": "missing",
            "out_of_memory_at": [1],
            "illegal_access_at": [3],
        },
        MODEL=str(micro()),
    )
    assert isinstance(answer, dict)
    assert answer["full"] == [["RuntimeError", OUT_OF_MEMORY], 0]
    assert answer["stubborn"] == [True, "unload refused"]
    assert answer["leak"] == [False, 10]
    assert answer["cublas"] == ["RuntimeError", NO_CUBLAS]
    assert answer["copy"] == ["std::bad_alloc", True, 10]
    assert answer["detached"][1] == "No model replica is available in this thread"
    assert answer["whole"] == "fine"
    assert answer["jit_s"] >= 0.05
    assert answer["illegal"] == [["RuntimeError", ILLEGAL_ACCESS]] * 2
    assert answer["broken"]


def test_an_unload_while_a_load_or_a_call_runs_does_nothing(gpus: FakeGpus) -> None:
    """
    It returns at once; the load or the call ends as if nothing had been.
    """
    gpus.set_state(ONE_CARD)
    answer = run_on_cards(
        gpus,
        _COMPARED
        + """
import threading
from standin.card import CardMemory

model = ctranslate2.models.Whisper(os.environ["MODEL"], "cuda", compute_type="int8")
inside, go_on = threading.Event(), threading.Event()
take = CardMemory.take

def slow_take(self, n_bytes):
    inside.set()
    go_on.wait(10)
    take(self, n_bytes)

def during(call):
    inside.clear(), go_on.clear()
    thread = threading.Thread(target=call)
    CardMemory.take = slow_take
    thread.start()
    inside.wait(10)
    model.unload_model()
    CardMemory.take = take
    go_on.set()
    thread.join()
    return model.model_is_loaded, standin.CALLS[-1][0]

answer = [during(lambda: model.encode(features))]
unload(settle(model))
answer.append(during(model.load_model))
""",
        MODEL=str(micro()),
    )
    assert answer == [[True, "unload refused"], [True, "unload refused"]]


def test_the_driver_and_models_change_a_card_at_the_same_time(gpus: FakeGpus) -> None:
    """
    A trim on one thread loses nothing that another allocates or frees.
    """
    gpus.set_state(ONE_CARD)
    answer = run_on_cards(
        gpus,
        """
        import threading
        from whispercache.devices.cuda import open_driver

        card, done = standin.CardMemory(0), threading.Event()
        card.start_context(1)

        def trim():
            while not done.is_set():
                open_driver().trim(0)
                open_driver().forget_peak(0)

        thread = threading.Thread(target=trim)
        thread.start()
        try:
            for _ in range(500):
                card.take(3)
                card.give_back(2)
        finally:
            done.set()
            thread.join()
        answer = standin.books().used
        """,
    )
    assert answer == 500
