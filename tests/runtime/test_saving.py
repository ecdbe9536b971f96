"""Readings on disk: what is loaded answers as what was saved, and what does not fit is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import architectures
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from qllm_runtime.config import MemoryConfig
from qllm_runtime.engine import QLLM
from qllm_runtime.errors import CancelledError, ClosedError, InvalidRequestError, OutOfMemoryError, SavedReadingError
from qllm_runtime.types import Answer, Document

BOOK = "The cat sat there.\r\nNaïve 👩‍🚀 said: the fox\ufeff ran.\n\n" * 8
DOCUMENTS = [Document(BOOK, "a.txt", {"source": "a.txt", "page_starts": [0, 40]}), Document("The bell is green. " * 9)]
LAYOUTS = {
    "qllm": {},
    "every key": {"repr_topk": 8},
    "one choice per head": {"selection": "per_kv_head"},
    "mean keys": {"summary": "mean"},
    "published summary": {"summary": "published"},
    "infllm": {"policy": "infllm"},
    "streaming": {"policy": "streaming"},
    "lm-infinite": {"policy": "lm-infinite"},
    "full": {"policy": "full"},
    "offloaded": {"device_blocks": 32},
    "offloaded, every key": {"device_blocks": 32, "repr_topk": 8},
}

HYBRIDS = ("qwen3_next", "lfm2", "falcon_h1", "nemotron_h", "zamba2", "gemma3n")


def engine(memory: MemoryConfig = tiny.MEMORY, seed: int = 0) -> QLLM:
    return QLLM(tiny.model(seed), tiny.tokenizer(), memory, name="tiny")


def told(answer: Answer) -> tuple[object, ...]:
    assert answer.logprobs is not None
    return answer.text, answer.sources, [token.logprob for token in answer.logprobs]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A reading of two documents."""
    engine().read(DOCUMENTS).save(tmp_path / "reading")
    return tmp_path / "reading"


class TestAnswers:
    @pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS.keys())
    def test_are_those_of_the_reading_itself(self, tmp_path, changes):
        llm, other = engine(tiny.MEMORY.replace(**changes)), engine()
        memory = llm.read(DOCUMENTS, system="Be brief.")
        memory.save(tmp_path / "reading")
        loaded = other.load_memory(tmp_path / "reading")
        for question in ("Who ran?", "What colour is the bell?"):
            mine, theirs = (
                each.ask(question, documents=read, max_tokens=12, logprobs=0)
                for each, read in ((llm, memory), (other, loaded))
            )
            assert told(mine) == told(theirs)
            assert theirs.usage.cache_read_tokens == memory.n_tokens
        assert loaded.config == memory.config
        assert (loaded.documents, loaded.system, loaded.n_tokens) == (memory.documents, "Be brief.", memory.n_tokens)
        assert [document.metadata for document in loaded.documents] == [dict(d.metadata) for d in DOCUMENTS]

    def test_of_fp8_blocks_come_from_the_same_numbers(self, tmp_path):
        llm = engine(tiny.MEMORY.replace(device_blocks=32, offload_dtype="fp8"))
        memory = llm.read(DOCUMENTS)
        memory.save(tmp_path / "first")
        llm.load_memory(tmp_path / "first").save(tmp_path / "second")
        for name in ("layer-000.safetensors", "layer-001.safetensors"):
            first, second = (load_file(tmp_path / which / name) for which in ("first", "second"))
            assert first.keys() == second.keys()
            assert all(torch.allclose(first[key].float(), second[key].float(), rtol=1e-6) for key in first)

    @pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "phi3-longrope", "mistral-sliding", *HYBRIDS])
    def test_of_models_with_sliding_layers_and_several_rotaries(self, tmp_path, name):
        kind, settings = architectures.SUPPORTED[name]
        llm = QLLM(architectures.build(kind, {**settings, "vocab_size": 264}), tiny.tokenizer(), tiny.MEMORY, name=name)
        memory = llm.read(" ".join(f"the cat {n * n} sat" for n in range(30)))  # no two blocks alike
        memory.save(tmp_path / "reading")
        loaded = llm.load_memory(tmp_path / "reading")
        mine, theirs = (llm.ask("the cat", documents=read, max_tokens=8, logprobs=0) for read in (memory, loaded))
        assert told(mine)[:2] == told(theirs)[:2]
        assert told(mine)[2] == pytest.approx(told(theirs)[2], abs=1e-4)  # a window begins at another slot

    def test_about_what_is_read_behind_it(self, saved):
        llm = engine()
        whole = llm.read("A third one. " * 20, after=llm.read(DOCUMENTS))
        later = llm.read("A third one. " * 20, after=llm.load_memory(saved))
        mine, theirs = (llm.ask("Which one?", documents=read, max_tokens=12, logprobs=0) for read in (whole, later))
        assert told(mine) == told(theirs)

    def test_of_a_text_that_never_left_the_window(self, tmp_path):
        llm = engine()
        memory = llm.read("ab")
        memory.save(tmp_path / "reading")
        loaded = llm.load_memory(tmp_path / "reading")
        mine, theirs = (llm.ask("Why?", documents=read, max_tokens=80, logprobs=0) for read in (memory, loaded))
        assert told(mine) == told(theirs)

    def test_in_another_process(self, saved, tmp_path):
        llm = engine()
        expected = llm.ask("Who ran?", documents=llm.load_memory(saved), max_tokens=12).text
        script = (
            "import sys; sys.path.insert(0, sys.argv[2]); import tiny; from qllm_runtime.engine import QLLM;"
            "llm = QLLM(tiny.model(), tiny.tokenizer(), tiny.MEMORY);"
            "print(ascii(llm.ask('Who ran?', documents=llm.load_memory(sys.argv[1]), max_tokens=12).text))"
        )
        run = subprocess.run(
            [sys.executable, "-c", script, saved, Path(__file__).parent], capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == ascii(expected)


class TestFolder:
    def test_progress_counts_layers(self, tmp_path):
        seen: list[tuple[int, int]] = []
        llm = engine()
        llm.read(BOOK).save(tmp_path / "reading", progress=lambda *step: seen.append(step))
        llm.load_memory(tmp_path / "reading", progress=lambda *step: seen.append(step))
        assert seen == [(1, 2), (2, 2)] * 2

    def test_another_reading_takes_its_place_whole(self, saved):
        llm = engine()
        llm.read("The second text. " * 3).save(saved)
        assert llm.load_memory(saved).documents[0].text.startswith("The second")
        assert [path.name for path in saved.parent.iterdir()] == ["reading"]

    def test_a_failure_leaves_what_was_there(self, saved, monkeypatch):
        def fails(*_: object) -> None:
            raise OSError(28, "No space left on device")

        before = sorted(path.name for path in saved.iterdir())
        monkeypatch.setattr("qllm_runtime.saving.save_file", fails)
        with pytest.raises(SavedReadingError, match="No space left"):
            engine().read("Another text.").save(saved)
        assert sorted(path.name for path in saved.iterdir()) == before
        assert [path.name for path in saved.parent.iterdir()] == ["reading"]
        assert engine().load_memory(saved).n_tokens

    def test_an_interruption_leaves_what_was_there(self, saved, monkeypatch):
        rename = Path.rename

        def interrupted(path: Path, target: Path) -> Path:
            if path.name.endswith(".new"):
                raise KeyboardInterrupt
            return rename(path, target)

        memory = engine().read("Another text.")
        monkeypatch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            memory.save(saved)
        assert [path.name for path in saved.parent.iterdir()] == ["reading"]
        assert engine().load_memory(saved).documents[0].text == BOOK

    def test_what_does_not_fit_on_the_disk_is_not_begun(self, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(SavedReadingError, match=r"takes about .* are free"):
            engine().read(BOOK).save(tmp_path / "reading")
        assert list(tmp_path.iterdir()) == []

    def test_other_files_are_never_replaced(self, tmp_path):
        memory = engine().read(BOOK)
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "reading.json").write_text('{"title": "mine"}')
        (tmp_path / "file").write_text("mine")
        for name in ("notes", "file"):
            with pytest.raises(SavedReadingError, match="name another folder"):
                memory.save(tmp_path / name)
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
    def test_all_of_it_can_be_read_by_whom_the_umask_lets(self, saved):
        assert len({path.stat().st_mode for path in saved.iterdir()}) == 1


class TestRefusals:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(SavedReadingError, match="There is no folder"):
            engine().load_memory(tmp_path / "none")
        with pytest.raises(SavedReadingError, match="holds no reading"):
            engine().load_memory(tmp_path)

    def test_other_weights(self, saved):
        with pytest.raises(SavedReadingError, match="other weights"):
            engine(seed=1).load_memory(saved)

    def test_other_weights_kept_as_buffers(self, tmp_path):
        def quantised(first: float) -> QLLM:
            model = tiny.model()
            model.register_buffer("packed", torch.tensor([first, 2.0]))
            return QLLM(model, tiny.tokenizer(), tiny.MEMORY)

        quantised(1.0).read(BOOK).save(tmp_path / "reading")
        assert quantised(1.0).load_memory(tmp_path / "reading").n_tokens
        with pytest.raises(SavedReadingError, match="other weights"):
            quantised(3.0).load_memory(tmp_path / "reading")

    def test_another_dtype(self, saved):
        llm = QLLM(tiny.model().half(), tiny.tokenizer(), tiny.MEMORY)
        with pytest.raises(SavedReadingError, match="dtype='float32'"):
            llm.load_memory(saved)

    def test_another_rotary_base(self, saved):
        model = tiny.model()
        model.config.rope_parameters["rope_theta"] = 5e5
        with pytest.raises(SavedReadingError, match="rotary settings"):
            QLLM(model, tiny.tokenizer(), tiny.MEMORY).load_memory(saved)

    def test_another_chat_template(self, saved):
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = "!" + tokenizer.chat_template
        with pytest.raises(SavedReadingError, match="tokenizer or chat template"):
            QLLM(tiny.model(), tokenizer, tiny.MEMORY).load_memory(saved)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda folder: (folder / "layer-001.safetensors").unlink(),
            lambda folder: (folder / "layer-001.safetensors").write_bytes(b"\0" * 30),
            lambda folder: (folder / "documents.json").write_text("[]"),
            lambda folder: (folder / "documents.json").write_text('[{"no": "text"}]'),
            lambda folder: (folder / "tokens.safetensors").unlink(),
            lambda folder: _change(folder / "reading.json", qllm_reading=2),
            lambda folder: _change(folder / "reading.json", memory={"n_local": -1}),
            lambda folder: _drop(folder / "layer-000.safetensors", "window.value"),
            lambda folder: _drop(folder / "layer-000.safetensors", "blocks.value"),
            lambda folder: shutil.copy(folder / "tokens.safetensors", folder / "layer-000.safetensors"),
        ],
    )
    def test_damage(self, saved, damage):
        damage(saved)
        with pytest.raises(SavedReadingError, match="is damaged"):
            engine().load_memory(saved)

    def test_what_json_cannot_hold(self, tmp_path):
        memory = engine().read([Document(BOOK), Document(BOOK, metadata={"when": object()})])
        with pytest.raises(InvalidRequestError, match="metadata of document 1"):
            memory.save(tmp_path / "reading")
        assert list(tmp_path.iterdir()) == []

    def test_faithful_mode(self, tmp_path):
        memory = engine(tiny.MEMORY.replace(faithful=True)).read(BOOK)
        with pytest.raises(InvalidRequestError, match="faithful"):
            memory.save(tmp_path / "reading")
        assert list(tmp_path.iterdir()) == []

    def test_a_closed_memory(self, tmp_path):
        memory = engine().read(BOOK)
        memory.close()
        with pytest.raises(ClosedError):
            memory.save(tmp_path / "reading")

    def test_cancelled(self, saved):
        cancel = threading.Event()
        llm = engine()
        with pytest.raises(CancelledError):
            llm.load_memory(saved, cancel=cancel, progress=lambda *_: cancel.set())
        assert llm.load_memory(saved).n_tokens

    def test_out_of_memory(self, saved, monkeypatch):
        def fails(*_: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        llm = engine()
        with monkeypatch.context() as patched:
            patched.setattr("qllm_runtime.memory.block.BlockMemory.restore", fails)
            with pytest.raises(OutOfMemoryError):
                llm.load_memory(saved)
        assert llm.load_memory(saved).n_tokens


def _change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _drop(path: Path, name: str) -> None:
    state = load_file(path)
    del state[name]
    save_file(state, path)
