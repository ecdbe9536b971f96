"""The command line as a user meets it: its output, its exit status, its one line of complaint."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qllm_runtime import cli, console
from qllm_runtime.command_options import Options
from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import InvalidConfigError
from qllm_runtime.types import Answer, Document, Source
from tests.office import epub, packed, word

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROSE = "\ufeffThe rain fell in torrents over the town. 👩‍🚀 Nobody was abroad.\r\n\r\n" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama with random weights, trained on 256 positions."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        [PROSE],
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "a book.txt"
    path.write_bytes(PROSE.encode())
    return str(path)


@pytest.fixture
def qllm(capfd):
    def call(*arguments):
        capfd.readouterr()
        status = cli.run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return status, out, err

    return call


class TestAsk:
    def test_folder(self, qllm, model, tmp_path):
        (tmp_path / "src").mkdir()
        (tmp_path / "src" / "fog.py").write_text(PROSE)
        (tmp_path / "read me.md").write_text("# Fog\n\nThe fog came and went.")
        (tmp_path / "data.bin").write_bytes(b"\0\1")
        status, out, err = qllm("ask", tmp_path, "Who was abroad?", "--model", model, "--max-tokens", 8, "--json")
        assert status == 0
        assert "1 of 3 files" in err and "data.bin" in err
        sources = json.loads(out)["sources"]
        assert sources and {s["document"] for s in sources} <= {
            str(tmp_path / name) for name in ("src/fog.py", "read me.md")
        }

    def test_json(self, qllm, model, book, tmp_path):
        page = tmp_path / "page.html"
        page.write_text("<p>The <b>fog</b> came &amp; went.</p>")
        arguments = ["ask", book, "Who was abroad?", "--document", page, "--model", model, "--max-tokens", 8, "--json"]
        status, out, err = qllm(*arguments)
        assert status == 0
        assert len(out.splitlines()) == 1
        result = json.loads(out)
        assert {"answer", "sources", "query_source", "usage", "timings"} <= set(result)
        assert result["query_source"] == "explicit"
        texts = {book: PROSE, str(page): "The fog came & went."}
        assert result["sources"]
        for source in result["sources"]:
            assert set(source) == {"document", "pages", "start", "end", "score", "text"}
            assert source["pages"] is None
            assert source["text"] == texts[source["document"]][source["start"] : source["end"]]
        assert result["usage"]["completion_tokens"] <= 8
        assert (
            result["usage"]["total_tokens"] == result["usage"]["prompt_tokens"] + result["usage"]["completion_tokens"]
        )
        assert result["timings"]["read_tokens_per_s"] > 0
        assert result["timings"]["peak_memory_bytes"] > 0
        assert "tokens" in err
        assert qllm(*arguments)[1] != ""  # and the next call works

    @pytest.mark.parametrize("policy", ["qllm", "infllm", "streaming", "lm-infinite", "full"])
    @pytest.mark.parametrize("mode", ["query_aware", "read_once"])
    def test_policies_and_modes(self, qllm, model, book, policy, mode):
        options = ["--policy", policy, "--mode", mode, "--model", model, "--max-tokens", 2, "--json"]
        status, out, _ = qllm("ask", book, "Who?", *options)
        assert status == 0
        result = json.loads(out)
        assert (result["policy"], result["mode"], result["reread"]) == (policy, mode, policy in ("qllm", "infllm"))
        if result["reread"]:
            assert not json.loads(qllm("ask", book, "Who?", *options, "--no-reread")[1])["reread"]

    def test_text(self, qllm, model, book):
        status, out, err = qllm("ask", book, "Who was abroad?", "--model", model, "--max-tokens", 8, "--block-size", 16)
        assert status == 0
        answer, _, rest = out.partition("\nSources\n")
        assert answer.strip()
        assert f"1. {book}[" in rest
        assert "tokens/s" in rest.splitlines()[-1]
        assert "peak memory" in rest.splitlines()[-1]
        assert "Reading: " in err

    def test_settings_reach_the_memory(self, qllm, model, book, tmp_path):
        config = tmp_path / "memory.yaml"
        config.write_text("policy: streaming\nn_local: 64\nexec_block_size: 32\n")
        options = ["--model", model, "--max-tokens", 1, "--json", "--memory-config", config]
        assert json.loads(qllm("ask", book, "Who?", *options)[1])["policy"] == "streaming"
        assert json.loads(qllm("ask", book, "Who?", *options, "--policy", "infllm")[1])["policy"] == "infllm"
        assert qllm("ask", book, "Who?", "--model", model, "--max-tokens", 1, "--n-local", 16, "--n-init", 0)[0] == 0

    @pytest.mark.skipif(sys.platform != "linux", reason="/dev/fd")
    def test_settings_from_a_pipe(self, qllm, model, book):
        reader, writer = os.pipe()
        os.write(writer, b"policy: streaming\nn_local: 64\nexec_block_size: 32\n")
        os.close(writer)
        options = ["--model", model, "--max-tokens", 1, "--json", "--memory-config", f"/dev/fd/{reader}"]
        status, out, err = qllm("ask", book, "Who?", *options)
        os.close(reader)
        assert status == 0, err
        assert json.loads(out)["policy"] == "streaming"

    def test_options_next_to_a_file(self, model, tmp_path):
        config = tmp_path / "memory.yaml"

        def memory(text, **chosen):
            config.write_text(text)
            return Options(model=model, memory_config=str(config), **chosen).open().memory

        assert memory("topk: 4", n_local=128) == MemoryConfig.for_model(256, topk=4, n_local=128)
        assert memory("topk: 4", n_local=32) == MemoryConfig.for_model(256, topk=4, n_local=32, exec_block_size=32)
        assert memory("summary: mean", n_local=64, block_size=2).repr_topk == 2
        assert memory("faithful: true", summary="published") == MemoryConfig(faithful=True)
        with pytest.raises(InvalidConfigError, match="exec_block_size"):  # it was asked for
            memory("exec_block_size: 256", n_local=128)

    def test_pages_of_a_pdf(self, qllm, tmp_path):
        pytest.importorskip("pypdf")
        sys.path.insert(0, str(ROOT / "tests" / "runtime"))
        from test_documents import make_pdf

        pdf = tmp_path / "a.pdf"
        pdf.write_bytes(make_pdf("It rained.", "The pass key is 71432."))
        status, out, _ = qllm("ask", pdf, "What is the pass key?", "--json")
        assert status == 0
        pages = {source["text"].strip(): source["pages"] for source in json.loads(out)["sources"]}
        assert next(pages[text] for text in pages if text.endswith("71432."))[1] == 2

    def test_word_files_and_books(self, qllm, tmp_path):
        contract, novel = tmp_path / "contract.docx", tmp_path / "novel.epub"
        row = "<w:tr><w:tc><w:p><w:r><w:t>{}</w:t></w:r></w:p></w:tc></w:tr>"
        key = row.format("The pass key is 71432.")
        contract.write_bytes(word("It rained.", f"<w:tbl><w:tblPr/><w:tblGrid/>{key}</w:tbl>"))
        novel.write_bytes(epub("The sea was calm.", "The captain is Ahab."))
        for given in ([contract, "--document", novel], [tmp_path]):
            document, *more = given
            status, out, _ = qllm("ask", document, "What is the pass key?", *more, "--json")
            assert status == 0
            texts = {
                str(contract): "It rained.\n\nThe pass key is 71432.",
                str(novel): "The sea was calm.\n\nThe captain is Ahab.",
            }
            result = json.loads(out)
            assert "71432" in result["answer"]
            assert "71432" in result["sources"][0]["text"]
            for source in result["sources"]:
                assert source["pages"] is None
                assert source["text"] == texts[source["document"]][source["start"] : source["end"]]

    def test_a_word_file_on_standard_input(self, model):
        arguments = ["ask", "-", "Who was abroad?", "--model", model, "--max-tokens", "2", "--json"]
        done = run_process(*arguments, input=word("Nobody was abroad that night."), encoding=None)
        assert done.returncode == 0, done.stderr
        sources = json.loads(done.stdout)["sources"]
        assert sources and all(source["text"] in "Nobody was abroad that night." for source in sources)

    def test_pdf_and_standard_input(self, model, book, tmp_path):
        pytest.importorskip("pypdf")
        sys.path.insert(0, str(ROOT / "tests" / "runtime"))
        from test_documents import make_pdf

        pdf = tmp_path / "a.pdf"
        pdf.write_bytes(make_pdf("Nobody was abroad that night."))
        done = run_process(
            "ask", str(pdf), "Who?", "--document", "-", "--model", model, "--max-tokens", "2", "--json", input=PROSE
        )
        assert done.returncode == 0, done.stderr
        texts = {str(pdf): "Nobody was abroad that night.", "-": PROSE}
        for source in json.loads(done.stdout)["sources"]:
            assert source["text"] == texts[source["document"]][source["start"] : source["end"]]


@pytest.mark.skipif(not (ROOT / "qllm_runtime/models/reader-plain").exists(), reason="the trained readers are not here")
class TestRead:
    """`qllm read`, and what it saved in place of a document."""

    @pytest.fixture
    def reading(self, qllm, model, book, tmp_path):
        status, out, _ = qllm("read", book, "--model", model, "--out", tmp_path / "saved")
        assert status == 0
        assert out.startswith(f"{tmp_path / 'saved'}: 1 documents, ")
        return str(tmp_path / "saved")

    def test_answers_are_those_of_the_file(self, qllm, model, book, reading):
        asked = ["Who was abroad?", "--model", model, "--max-tokens", 8, "--json"]
        from_file, from_reading = (json.loads(qllm("ask", name, *asked)[1]) for name in (book, reading))
        assert from_reading["answer"] == from_file["answer"]
        assert from_reading["sources"] == from_file["sources"]
        assert from_file["usage"]["cache_read_tokens"] == 0 < from_reading["usage"]["cache_read_tokens"]

    def test_more_is_read_behind_it(self, qllm, model, reading, tmp_path):
        (tmp_path / "fog.md").write_text("The fog came and went.")
        more = ["--document", tmp_path / "fog.md", "--model", model]
        status, out, err = qllm("ask", reading, "Who was abroad?", *more, "--max-tokens", 4, "--json")
        assert status == 0 and "Loading: 2/2 layers" in err
        status, saved, _ = qllm("read", reading, *more, "--out", reading)
        assert status == 0 and ": 2 documents, " in saved
        status, again, err = qllm("ask", reading, "Who was abroad?", "--model", model, "--max-tokens", 4, "--json")
        assert json.loads(again)["answer"] == json.loads(out)["answer"]
        assert json.loads(again)["usage"]["cache_read_tokens"] == json.loads(out)["usage"]["cache_read_tokens"]

    def test_chat(self, qllm, model, reading, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Who was abroad?\n"))
        status, out, _ = qllm("chat", reading, "--model", model, "--max-tokens", 4)
        assert status == 0
        assert "tokens read before" in out and "a book.txt[" in out

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["ask", "READING", "Who?", "--n-local", "64", "--policy", "infllm"], "leave out --policy, --n-local"),
            (["ask", "READING", "Who?", "--system", "Be brief."], "leave out --system"),
            (["ask", "BOOK", "Who?", "--document", "READING"], "ahead of all documents"),
            (["ask", "READING", "Who?", "--document", "READING"], "name one only"),
            (["ask", "READING", "Who?", "--model", "reader-plain"], "was read by"),
            (["ask", "READING", "Who?", "--mode", "query_aware"], "were read before"),
            (["read", "BOOK", "--out", "BOOK"], "name another folder"),
            (["read", "BOOK"], "--out"),
        ],
    )
    def test_bad_input_is_one_line(self, qllm, model, book, reading, arguments, words):
        named = [{"READING": reading, "BOOK": book}.get(argument, argument) for argument in arguments]
        status, out, err = qllm(*named, *([] if "--model" in named else ["--model", model]))
        assert (status, out) == (2, "")
        assert words in err.splitlines()[-1]
        assert err.splitlines()[-1].startswith("qllm: ")

    def test_what_cannot_be_written_costs_no_reading(self, qllm, model, book):
        _, _, err = qllm("read", book, "--model", model, "--out", Path(book).parent)
        assert err.count("\n") == 1


def test_the_reader_finds_a_fact_and_shows_it(qllm, tmp_path):
    fact = "The pass key is 71432."
    path = tmp_path / "story.txt"
    path.write_text(f"{PROSE} {fact} {PROSE}", encoding="utf-8")
    status, out, _ = qllm("ask", path, "What is the pass key?", "--json")
    assert status == 0
    assert "71432" in json.loads(out)["answer"]
    assert fact in json.loads(out)["sources"][0]["text"]


class TestBadInput:
    """Exit status 2, nothing on stdout, one line on stderr."""

    def refused(self, result, *words):
        status, out, err = result
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1, err
        assert err.startswith("qllm: ")
        for part in words:
            assert part in err

    @pytest.mark.parametrize(
        ("data", "word"),
        [
            (b"", "empty"),
            (b"\n \n", "white space"),
            (b"caf\xe9 x", "UTF-8"),
            (b"\x00\x01", "binary"),
            (b"PK\x03\x04", "zip"),
        ],
    )
    def test_documents(self, qllm, model, tmp_path, data, word):
        path = tmp_path / "bad.txt"
        path.write_bytes(data)
        self.refused(qllm("ask", path, "Who?", "--model", model), "bad.txt", word)
        self.refused(qllm("chat", path, "--model", model), "bad.txt", word)

    @pytest.mark.parametrize(
        ("name", "data", "words"),
        [
            ("old.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), (".doc", "save it as .docx")),
            ("rich.rtf", b"{\\rtf1 Hello}", (".rtf", "save it as .docx")),
            ("open.odt", packed({"mimetype": "application/vnd.oasis.opendocument.text"}), (".odt", "save it as .docx")),
            ("cut.docx", word("x")[:500], ("damaged", "download it or save it again")),
            ("not.epub", b"text", ("not an EPUB file",)),
            (
                "drm.epub",
                epub("x", members={"META-INF/encryption.xml": '<x><CipherReference URI="OEBPS/c1.xhtml"/></x>'}),
                ("DRM",),
            ),
        ],
    )
    def test_files_of_other_kinds(self, qllm, model, tmp_path, name, data, words):
        path = tmp_path / name
        path.write_bytes(data)
        self.refused(qllm("ask", path, "Who?", "--model", model), name, *words)

    def test_missing_things(self, qllm, model, book, tmp_path):
        self.refused(qllm("ask", tmp_path / "none.txt", "Who?"), "no file")
        (tmp_path / "empty").mkdir()
        self.refused(qllm("ask", tmp_path / "empty", "Who?"), "directory")
        self.refused(qllm("ask", "", "Who?"), "empty")
        self.refused(qllm("ask", book, "Who?", "--document", tmp_path / "none.txt"), "no file")
        self.refused(qllm("ask", "Who?"), "question")
        self.refused(qllm("ask", book), "question")
        self.refused(qllm("ask"), "document")
        self.refused(qllm("ask", book, "  ", "--model", model), "question is empty")
        self.refused(qllm("ask", "-", "Who?", "--document", "-"), "once")
        self.refused(qllm("chat", "-"), "file")
        self.refused(qllm("ask", "https://example.org/a.html", "Who?"), "https://example.org/a.html", "fetched")
        self.refused(qllm("nonsense"), "nonsense")
        self.refused(qllm("ask", book, "Who?", "--nonsense"), "--nonsense")

    def test_a_file_named_as_an_option(self, qllm, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "-dash.txt").write_text(PROSE)
        self.refused(qllm("ask", "-dash.txt", "Who?"), "./-dash.txt")
        assert "./" not in qllm("ask", "-none.txt", "Who?")[2]

    @pytest.mark.parametrize(
        "option",
        [
            ("--max-tokens", 0), ("--max-tokens", -5), ("--max-tokens", "x"), ("--topk", 0), ("--n-local", 0),
            ("--n-local", 257), ("--n-init", 257),
            ("--n-init", -1), ("--block-size", -1), ("--temperature", -1), ("--top-p", 2), ("--top-p", 0), ("--policy", "best"),
            ("--mode", "twice"), ("--device", "toaster"), ("--dtype", "int3"), ("--query-weight", -1),
        ],
    )  # fmt: skip
    def test_limits(self, qllm, model, book, option):
        self.refused(qllm("ask", book, "Who?", "--model", model, *option))

    def test_models(self, qllm, book, tmp_path):
        self.refused(qllm("ask", book, "Who?", "--model", tmp_path / "none"), "none")
        (tmp_path / "config.json").write_text("{}")
        self.refused(qllm("ask", book, "Who?", "--model", tmp_path))

    def test_memory_configs(self, qllm, model, book, tmp_path):
        config = tmp_path / "memory.yaml"
        self.refused(qllm("ask", book, "Who?", "--model", model, "--memory-config", config), "memory.yaml")
        for text in ("n_local: -3", "nonsense: 1", "- a", "repr_topk: 99\nblock_size: 8"):
            config.write_text(text)
            self.refused(qllm("ask", book, "Who?", "--model", model, "--memory-config", config))


@pytest.mark.skipif(sys.platform != "linux", reason="a shell, /dev/full and file names of any bytes")
class TestStreams:
    """Standard streams that are closed or full: exit status 2 and one line on stderr."""

    def shell(self, redirection, *arguments, unbuffered=""):
        code = "from qllm_runtime.cli import main; main()"
        command = ["sh", "-c", f'exec "$0" "$@" {redirection}', sys.executable, "-c", code, *arguments]
        variables = {**environment(), "PYTHONUNBUFFERED": unbuffered}
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)

    @pytest.mark.parametrize("unbuffered", ["", "1"])
    @pytest.mark.parametrize(
        ("redirection", "command", "words"),
        [
            ("<&-", ["ask", "-", "Who?"], "nothing to read"),
            ("<&-", ["chat", "BOOK"], "no questions to read"),
            (">&-", ["ask", "BOOK", "Who?"], "standard output is closed"),
            (">/dev/full", ["models"], "cannot write to standard output: No space left"),
            (
                ">/dev/full",
                ["ask", "BOOK", "Who?", "--max-tokens", "2", "--no-reread"],
                "cannot write to standard output",
            ),
        ],
    )
    def test_unusable(self, model, book, redirection, command, words, unbuffered):
        command = [book if word == "BOOK" else word for word in command]
        chosen = [] if command == ["models"] else ["--model", model]
        done = self.shell(redirection, *command, *chosen, unbuffered=unbuffered)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("Reading: ")]
        assert (done.returncode, len(lines)) == (2, 1), done.stderr
        assert lines[0].startswith("qllm: ")
        assert words in lines[0]

    def test_closed_stderr(self):
        done = self.shell("2>&-", "models")
        assert done.returncode == 0
        assert "reader" in done.stdout

    def test_a_name_of_any_bytes(self, model, tmp_path):
        path = os.fsencode(tmp_path) + b"/n\xff.txt"
        with open(path, "w") as file:
            file.write(PROSE)
        done = run_process("ask", path, "Who?", "--model", model, "--max-tokens", "2", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sources"]


def test_a_warning_is_one_line(qllm, model, book):
    status, _, err = qllm("ask", book, "Who?", "--model", model, "--policy", "full", "--max-tokens", 2)
    assert status == 0
    (line,) = (line for line in err.splitlines() if not line.startswith("Reading: "))
    assert line.startswith("qllm: warning: policy 'full' reads ")


class TestChat:
    def test_conversation(self, model, book):
        lines = "Who was abroad?\n\n/sources\n/dance\nAnd why?\n/new\nWho?\n/quit\nnever asked\n"
        done = run_process("chat", book, "--model", model, "--max-tokens", "4", input=lines)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("read before") == 3  # three answers over one reading
        assert "Unknown command /dance" in done.stdout
        assert f"{book}[" in done.stdout
        assert "never asked" not in done.stdout

    def test_end_of_input_ends_it(self, model, book):
        done = run_process("chat", book, "--model", model, input="")
        assert (done.returncode, done.stdout) == (0, "")


class TestModels:
    def test_builtin(self, qllm):
        status, out, err = qllm("models")
        assert (status, err) == (0, "")
        assert "reader" in out
        assert "reader-plain" in out

    def test_verdicts(self, qllm, model, tmp_path):
        status, out, _ = qllm("models", model)
        assert status == 0
        assert f"{model}: supported" in out
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
        status, out, _ = qllm("models", model, tmp_path)
        assert status == 1
        assert f"{tmp_path}: not supported: " in out

    def test_one_that_is_not_there_hides_no_other(self, qllm, model, tmp_path):
        status, out, err = qllm("models", tmp_path / "none", model)
        assert status == 2
        assert out.startswith(f"{model}: supported")
        assert err.startswith("qllm: No model") and len(err.splitlines()) == 1

    def test_the_hub_is_named_before_it_is_asked(self, capsys, monkeypatch, tmp_path):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "here").mkdir()
        for name in ("here", "./none", "gpt2"):
            console.looking_for(name)
        assert capsys.readouterr().err == "Looking for 'gpt2' on the Hugging Face hub ...\n"


class TestPassages:
    """How sources are printed."""

    def shown(self, text, span, capsys, **metadata):
        source = Source(0, None, *span, 0.5, text[slice(*span)])
        console.print_sources([source], [Document(text, metadata=metadata)], ["a.pdf"], whole=False)
        return capsys.readouterr().out

    @pytest.mark.parametrize(("span", "pages"), [((0, 4), "page 1"), ((6, 9), "page 2"), ((2, 9), "pages 1-2")])
    def test_pages(self, span, pages, capsys):
        assert f"a.pdf[{span[0]}:{span[1]}] {pages}  50 %" in self.shown(
            "one.\n\ntwo.", span, capsys, page_starts=(0, 6)
        )

    def test_a_byte_order_mark_is_counted_and_not_shown(self, capsys):
        assert "\ufeff" not in self.shown("\ufeffone.", (0, 5), capsys)

    def test_a_refusal_has_no_sources(self):
        assert console.heading(Answer("The text does not say.")) == "Looked at"
        assert console.heading(Answer("The text does not say. It rained.")) == "Sources"


@pytest.mark.parametrize("command", [(), ("bench",)])
def test_without_arguments_it_shows_the_help(qllm, command):
    status, out, err = qllm(*command)
    assert (status, out) == (2, "")
    assert err.startswith(" ".join(("Usage: qllm", *command)))
    assert len(err.splitlines()) > 5


def test_help_and_version_are_light(qllm):
    assert qllm("--version")[1].startswith("qllm 0.")
    code = (
        "import sys; from qllm_runtime.cli import run; assert run(['ask', '--help']) == 0; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")
class TestInterruption:
    def start(self, model, book, **streams):
        code = "from qllm_runtime.cli import main; main()"
        arguments = [
            "ask",
            book,
            "Who?",
            "--model",
            model,
            "--max-tokens",
            "100000",
            "--temperature",
            "1",
            "--seed",
            "1",
        ]
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **streams,
        )  # fmt: skip

    def test_control_c(self, model, book):
        with self.start(model, book) as process:
            assert process.stdout.read(1)  # it is writing
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err.splitlines()[-1] == b"qllm: interrupted"
        assert b"Traceback" not in err

    @pytest.mark.parametrize("module", ["logging", "typer", "pydantic", "torch", "transformers"])
    def test_control_c_while_modules_load(self, model, book, module):
        code = (
            "import os, signal, sys\n"
            "class Interrupt:\n"
            "    def find_spec(self, name, *_):\n"
            f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
            "from qllm_runtime.cli import main; sys.meta_path.insert(0, Interrupt()); main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "ask", book, "Who?", "--model", model],
            env=environment(), capture_output=True, timeout=120, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "qllm: interrupted\n")

    def test_reader_of_the_output_leaves(self, model, book):
        with self.start(model, book) as process:
            assert process.stdout.read(1)
            process.stdout.close()
            begun = time.monotonic()
            process.wait(timeout=60)
            err = process.stderr.read()
        assert process.returncode == 141
        assert b"Traceback" not in err
        assert time.monotonic() - begun < 30


def environment():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def run_process(*arguments, **options):
    code = "from qllm_runtime.cli import main; main()"
    options = {"capture_output": True, "timeout": 120, "encoding": "utf-8", **options}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment(), **options)
