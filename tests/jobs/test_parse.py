"""Job files that are wrong: each message says where, what was given, the limit, what to type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.errors import Problem, SpecError, render_error
from jobs.parse import apply_overrides, load_spec, parse_spec, recorded_spec
from jobs.search_spec import ASHA, Finalists, MedianStopping, Search, TPESearch
from jobs.spec import JobSpec

GOOD = """\
name: sentiment
task: {labels: [negative, positive]}
model: {source: s3://models/minilm}
data: {train: s3://lake/reviews/train}
store: s3://shoal/runs
"""


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> JobSpec:
    path = Path("job.yaml")
    path.write_text(text, encoding="utf-8")
    return load_spec(path, overrides)


def problems(text: str, *overrides: str) -> list[tuple[str, str | None]]:
    with pytest.raises(SpecError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return [(p.message, p.hint) for p in caught.value.problems]


def problem(text: str, *overrides: str) -> tuple[str, str | None]:
    (only,) = problems(text, *overrides)
    return only


# ------------------------------------------------------------------------------- what is right


@pytest.mark.usefixtures("in_folder")
class TestAGoodFile:
    def test_gives_every_key_its_value_or_its_default(self) -> None:
        spec = load(GOOD + "optimizer: {learning_rate: 1e-4}\n")
        assert spec.task.labels == ("negative", "positive")
        assert spec.optimizer.learning_rate == 1e-4
        assert spec.batching.global_batch_size == 32
        assert spec.store.uri == "s3://shoal/runs"
        assert spec.lanes == spec.workers.count == 1

    @pytest.mark.parametrize(
        ("written", "number"),
        [("3e-5", 3e-5), ("3E-5", 3e-5), ("1e5", 1e5), (".5e-3", 5e-4), ("2.5e-4", 2.5e-4)],
    )
    def test_reads_numbers_with_exponents_as_numbers(self, written: str, number: float) -> None:
        spec = load(GOOD + f"optimizer: {{learning_rate: {written}}}\n")
        assert spec.optimizer.learning_rate == number

    def test_takes_a_whole_number_where_a_number_is_wanted(self) -> None:
        assert load(GOOD + "optimizer: {weight_decay: 0}\n").optimizer.weight_decay == 0.0

    def test_may_write_labels_as_whole_numbers(self) -> None:
        assert load(GOOD.replace("[negative, positive]", "[0, 1]")).task.labels == ("0", "1")

    @pytest.mark.parametrize(
        ("written", "size"),
        [("1.5 GiB", 3 * 2**29), ("512MiB", 2**29), ("4096", 4096), ("64 KiB", 2**16)],
    )
    def test_may_write_sizes_with_a_unit(self, written: str, size: int) -> None:
        text = GOOD.replace("data: {", f"data: {{stream_memory: {written}, ")
        assert load(text).data.stream_memory == size

    def test_may_say_how_the_store_is_reached(self) -> None:
        store = "store: {uri: s3://shoal/runs, access: {endpoint_url: 'http://127.0.0.1:8333'}}"
        spec = load(GOOD.replace("store: s3://shoal/runs", store))
        assert spec.store.access.endpoint_url == "http://127.0.0.1:8333"

    def test_may_use_anchors_and_merges(self) -> None:
        spec = load(
            GOOD.replace("{train: s3://lake/reviews/train}", "{train: &t a, validation: *t}")
            + "batching: {<<: {global_batch_size: 4}, max_tokens_per_microbatch: 99}\n"
        )
        assert (spec.data.train, spec.data.validation) == ("a", "a")
        assert spec.batching.global_batch_size == 4

    def test_may_begin_with_a_byte_order_mark(self) -> None:
        assert load("\ufeff" + GOOD).name == "sentiment"

    def test_survives_the_way_through_the_run_folder(self) -> None:
        text = GOOD.replace("data: {", "data: {stream_memory: 1.5 GiB, lanes: 6, ")
        spec = load(text + "train: {early_stopping: null}\noptimizer: {betas: [0.8, 0.9]}\n")
        assert recorded_spec(spec.to_bytes()) == spec

    def test_may_be_what_a_run_folder_holds_edited_or_not(self, tmp_path: Path) -> None:
        spec = load(GOOD)
        path = tmp_path / "spec.json"
        path.write_bytes(spec.to_bytes())
        assert load_spec(path) == spec
        path.write_bytes(spec.to_bytes().replace(b'"sentiment"', b'"other"'))
        assert load_spec(path).name == "other"
        with pytest.raises(ValueError, match="its digest is another"):
            recorded_spec(path.read_bytes())


# --------------------------------------------------------------------------------- files


@pytest.mark.usefixtures("in_folder")
class TestAFile:
    def test_that_is_missing_names_the_nearest_one(self) -> None:
        Path("sentiment.yaml").write_text(GOOD)
        with pytest.raises(SpecError) as caught:
            load_spec(Path("sentimnt.yaml"))
        assert caught.value.problems == (
            Problem("sentimnt.yaml: no such file", "did you mean sentiment.yaml?"),
        )

    def test_that_is_missing_alone_says_what_to_name(self) -> None:
        with pytest.raises(SpecError) as caught:
            load_spec(Path("no/where.yaml"))
        assert caught.value.problems[0].hint == "name a job file: shoal run job.yaml"

    def test_that_is_a_folder_names_a_job_in_it(self) -> None:
        Path("jobs").mkdir()
        Path("jobs/a.yaml").write_text(GOOD)
        with pytest.raises(SpecError) as caught:
            load_spec(Path("jobs"))
        assert caught.value.problems == (
            Problem("jobs is a folder, but a job is a YAML file", "did you mean jobs/a.yaml?"),
        )

    def test_in_another_encoding_names_the_byte(self) -> None:
        Path("job.yaml").write_bytes(b"name: caf\xe9\n")
        with pytest.raises(SpecError, match="is not UTF-8 text: byte 9 is 0xe9"):
            load_spec(Path("job.yaml"))

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("", "is empty"),
            ("# only a comment\n", "is empty"),
            ("---\n", "is empty"),
            ("- name: a\n", "holds a list"),
            ("hello\n", "holds a single value"),
        ],
    )
    def test_without_keys_says_what_it_holds(self, text: str, found: str) -> None:
        message, hint = problem(text)
        assert message == f"job.yaml {found}, but a job is a group of keys"
        assert hint is not None
        assert "name, task, model, data and store" in hint


@pytest.mark.usefixtures("in_folder")
class TestYaml:
    @pytest.mark.parametrize(
        ("text", "message", "hint"),
        [
            (
                "name: a\n\ttask: 1\n",
                "job.yaml, line 2: a tab stands where YAML allows only spaces",
                "indent with spaces; YAML allows no tabs there",
            ),
            (
                "name: a: b\n",
                "job.yaml, line 1: a second ':' in one line: name: a: b",
                "quote a text that holds ': ', and start each key on a line of its own",
            ),
            (
                "name: a\ntask: {labels: [x\n",
                "job.yaml, line 2: what opens here is not closed: task: {labels: [x",
                "add the missing bracket or quote",
            ),
            (
                "name: 'a\n",
                "job.yaml, line 1: what opens here is not closed: name: 'a",
                "add the missing bracket or quote",
            ),
            (
                "name: !!python/object:os.system {}\n",
                "job.yaml, line 1: tags of programming languages are not read: "
                "name: !!python/object:os.system {}",
                "write a plain value",
            ),
            (
                "name: a\n---\nname: b\n",
                "job.yaml, line 2: a second document starts",
                "keep one job in a file",
            ),
            (
                "name: &a [*a]\n",
                "job.yaml, line 1: a value contains itself: name: &a [*a]",
                "write the value out",
            ),
            (
                "[a]: b\n",
                "job.yaml, line 1: a list or a group stands as a key: [a]: b",
                "keys are plain words",
            ),
            (
                "name: 2024-13-45\n",
                "job.yaml is not valid YAML: month must be in 1..12",
                "quote texts that look like dates",
            ),
        ],
        ids=lambda value: value.splitlines()[0],
    )
    def test_that_cannot_be_read_names_the_line(self, text: str, message: str, hint: str) -> None:
        assert problem(text) == (message, hint)

    def test_with_a_wrong_indentation_says_so(self) -> None:
        message, hint = problem("task:\n  kind: a\n   labels: b\n")
        assert message.startswith("job.yaml, line 3")
        assert hint is not None

    def test_with_a_character_that_no_text_holds_is_refused(self) -> None:
        message, hint = problem("name: a\x00b\n")
        assert message.startswith("job.yaml is not valid YAML: ")
        assert hint == "save it as plain UTF-8 text"

    def test_with_keys_given_twice_names_both_lines(self) -> None:
        assert problems(GOOD + "name: b\nworkers: {count: 1, count: 2}\n") == [
            ("job.yaml, line 6: name stands twice, first in line 1", "remove one of the two"),
            ("job.yaml, line 7: count stands twice, first in line 7", "remove one of the two"),
        ]


# ------------------------------------------------------------------------- keys and values


@pytest.mark.usefixtures("in_folder")
class TestAnUnknownKey:
    @pytest.mark.parametrize(
        ("line", "key", "meant"),
        [
            ("traner: {epochs: 1}", "traner", "train"),
            ("optimizer: {warmup: 3}", "optimizer.warmup", "optimizer.warmup_steps"),
            ("optimizer: {learning_rte: 3}", "optimizer.learning_rte", "optimizer.learning_rate"),
            ("retries: {worker_failurs: 3}", "retries.worker_failurs", "retries.worker_failures"),
            ("learning_rate: 1", "learning_rate", "optimizer.learning_rate"),
            ("lr: 1", "lr", "optimizer.learning_rate"),
            ("batch_size: 4", "batch_size", "batching.global_batch_size"),
            ("train: {num_train_epochs: 4}", "train.num_train_epochs", "train.epochs"),
            ("workers: {num_workers: 4}", "workers.num_workers", "workers.count"),
        ],
    )
    def test_is_refused_with_the_nearest_known_one(self, line: str, key: str, meant: str) -> None:
        assert problem(GOOD + line + "\n") == (
            f"job.yaml, line 6: {key} is not a known key",
            f"did you mean {meant}?",
        )

    @pytest.mark.parametrize("key", ["sweep", "1", "~", "on"])
    def test_without_a_near_one_lists_the_known_ones(self, key: str) -> None:
        message, hint = problem(GOOD + f"{key}: null\n")
        assert message.endswith("is not a known key")
        assert hint is not None
        assert hint.startswith("known here: name, task, model")

    def test_deep_inside_lists_the_known_ones_there(self) -> None:
        assert problem(GOOD + "workers: {xyz: 1}\n") == (
            "job.yaml, line 6: workers.xyz is not a known key",
            "known in workers: count, min, resize_seconds, strategy, cpus, memory_gib, gpus",
        )

    @pytest.mark.parametrize("key", ["aws_secret_access_key", "password", "session_token"])
    def test_that_would_hold_a_secret_is_refused_without_showing_it(self, key: str) -> None:
        store = f"store: {{uri: s3://a, access: {{{key}: hunter2}}}}"
        (message, hint) = problem(GOOD.replace("store: s3://shoal/runs", store))
        assert "hunter2" not in message
        assert hint is not None
        assert "holds no secrets" in hint


VALUES = [
    # line, message after "job.yaml, line 6: ", hint
    (
        'optimizer: {learning_rate: "3e-5"}',
        'optimizer.learning_rate is "3e-5", but must be a number above 0',
        "write learning_rate: 3e-5, without quotes",
    ),
    (
        "optimizer: {learning_rate: fast}",
        'optimizer.learning_rate is "fast", but must be a number above 0',
        "write for example learning_rate: 3e-5",
    ),
    (
        "optimizer: {learning_rate: -1}",
        "optimizer.learning_rate is -1, but must be a number above 0",
        "write for example learning_rate: 3e-5",
    ),
    (
        "optimizer: {learning_rate: .inf}",
        "optimizer.learning_rate is infinite, but must be a number above 0",
        "write for example learning_rate: 3e-5",
    ),
    (
        "optimizer: {learning_rate: yes}",
        "optimizer.learning_rate is true, but must be a number above 0",
        "YAML reads yes, no, on and off as true and false; write for example learning_rate: 3e-5",
    ),
    (
        "optimizer: {learning_rate: }",
        "optimizer.learning_rate is empty, but must be a number above 0",
        "write learning_rate: 3e-5",
    ),
    (
        "optimizer: {kind: AdamW}",
        'optimizer.kind is "AdamW", but must be adamw, sgd or adafactor or an import path such as '
        "torch.optim.NAdam",
        "write kind: adamw",
    ),
    (
        "optimizer: {schedule: cosin}",
        'optimizer.schedule is "cosin", but must be constant, linear, cosine, cosine-restarts, '
        "one-cycle, inverse-sqrt or plateau",
        "write schedule: cosine",
    ),
    (
        "optimizer: {betas: [0.9]}",
        "optimizer.betas is [0.9], but must be a list of 2, "
        "each a number of at least 0 and below 1",
        "write for example betas: [0.9, 0.999]",
    ),
    (
        "optimizer: {kind: sgd, betas: [0.9, 0.95]}",
        "optimizer has betas, without effect on sgd",
        "remove optimizer.betas, or write optimizer.kind: adamw",
    ),
    (
        "optimizer: adamw",
        'optimizer is "adamw", but must be a group of keys',
        "write optimizer: {kind: adamw}",
    ),
    (
        "batching:",
        "batching is empty, but must be a group of keys",
        "write its keys below it (global_batch_size, max_tokens_per_microbatch, launch_tokens, "
        "packing), or remove batching:",
    ),
    (
        "batching: [1]",
        "batching is [1], but must be a group of keys",
        "write its keys below it: global_batch_size, max_tokens_per_microbatch, launch_tokens, "
        "packing",
    ),
    (
        "batching: {global_batch_size: 1e3}",
        "batching.global_batch_size is 1000.0, but must be a whole number above 0",
        "write global_batch_size: 1000",
    ),
    (
        'workers: {count: "2"}',
        'workers.count is "2", but must be a whole number above 0',
        "write count: 2, without quotes",
    ),
    (
        "workers: {count: 0}",
        "workers.count is 0, but must be a whole number above 0",
        "write for example count: 1",
    ),
    ("workers: {gpus: 4}", "workers.gpus is 4, but must be 0 or 1", "write for example gpus: 0"),
    (
        "train: {log_rows: 1}",
        "train.log_rows is 1, but must be true or false",
        "write for example log_rows: false",
    ),
    (
        "train: {early_stopping: true}",
        "train.early_stopping is true, but must be a group of keys",
        "write early_stopping: {metric: validation/f1, patience: 3}",
    ),
    (
        "tracking: tensorboard",
        'tracking is "tensorboard", but must be a list of tensorboard, mlflow or wandb',
        "write tracking: [tensorboard]",
    ),
    (
        "tracking: [aim]",
        'tracking[0] is "aim", but must be tensorboard, mlflow or wandb',
        "write tensorboard, mlflow or wandb there, or remove item 1",
    ),
    (
        "cluster: {kind: kubray, image: a}",
        'cluster.kind is "kubray", but must be local or kuberay',
        "write kind: kuberay",
    ),
    (
        "cluster: {image: a}",
        "cluster.kind is missing",
        "add cluster.kind: local or kuberay",
    ),
    (
        "cluster: {kind: kuberay}",
        "cluster.image is missing",
        "add cluster.image: registry.example.com/shoal:0.1.0",
    ),
    (
        "cluster: {kind: kuberay, image: a, imagee: b}",
        "cluster.imagee is not a known key",
        "did you mean cluster.image?",
    ),
    (
        "cluster: {kind: kuberay, image: a, env_from_secret: [b]}",
        "cluster.env_from_secret is not a known key",
        "did you mean cluster.env_from_secrets?",
    ),
    (
        "cluster: {kind: kuberay, image: a, secret_key: b}",
        "cluster.secret_key is not a known key",
        "a job file is stored with the run and holds no secrets: name a secret of Kubernetes in "
        "cluster.env_from_secrets",
    ),
    (
        "cluster: {kind: local, image: a, queue: b}",
        "cluster.image and cluster.queue belong to cluster.kind kuberay, but cluster.kind is local",
        "write cluster.kind: kuberay, or keep local alone: --set 'cluster={kind: local}'",
    ),
    (
        "cluster: {kind: kuberay, image: a, env_from_secrets: [AKIA]}",
        "cluster.env_from_secrets[0] must be the name of a secret in Kubernetes, never its value: "
        "the job file is stored with the run",
        "make a secret: kubectl create secret generic NAME --from-literal=KEY=..., and write NAME",
    ),
]


@pytest.mark.usefixtures("in_folder")
class TestAWrongValue:
    @pytest.mark.parametrize(("line", "message", "hint"), VALUES, ids=[v[0] for v in VALUES])
    def test_is_told_with_its_limit_and_what_to_type(
        self, line: str, message: str, hint: str
    ) -> None:
        validation = GOOD.replace("train}", "train, validation: s3://lake/v}")
        assert problem(validation + line + "\n") == (f"job.yaml, line 6: {message}", hint)

    @pytest.mark.parametrize(
        ("labels", "message", "hint"),
        [
            (
                "[NO, MAYBE]",
                "task.labels[0] is false, but must be a text or a whole number",
                "YAML reads yes, no, on and off without quotes as true and false; "
                'for a text, quote the word: "no"',
            ),
            (
                "[0.5, a]",
                "task.labels[0] is 0.5, but must be a text or a whole number",
                'quote it, to make it a text: "0.5"',
            ),
            (
                "[a, null]",
                "task.labels[1] is empty, but must be a text or a whole number",
                "write a text or a whole number there, or remove item 2",
            ),
            (
                "[a]",
                'task.labels is ["a"], but must be a list of at least 2 texts',
                "write for example labels: [negative, positive]",
            ),
            (
                "negative",
                'task.labels is "negative", but must be a list of at least 2 texts',
                "write for example labels: [negative, positive]",
            ),
            (
                "[a, b, a]",
                'task.labels is ["a", "b", "a"], but must hold each label once; given twice: a',
                "remove the second",
            ),
        ],
    )
    def test_among_the_labels_is_told(self, labels: str, message: str, hint: str) -> None:
        text = GOOD.replace("[negative, positive]", labels)
        assert problem(text) == (f"job.yaml, line 2: {message}", hint)

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("My_Job", "write name: my-job"),
            ("9-lives-", "write name: lives"),
            ("a" * 41, "write name: " + "a" * 40),
            ("'---'", "write name: sentiment"),
        ],
    )
    def test_as_the_name_is_told_with_one_that_fits(self, name: str, hint: str) -> None:
        message, given_hint = problem(GOOD.replace("sentiment", name))
        assert "must be at most 40 lower-case letters, digits and hyphens" in message
        assert given_hint == hint
        assert load(GOOD.replace("sentiment", hint.removeprefix("write name: "))).name

    def test_as_the_name_may_not_be_a_number(self) -> None:
        assert problem(GOOD.replace("sentiment", "12")) == (
            "job.yaml, line 1: name is 12, but must be a text",
            'quote it, to make it a text: "12"',
        )

    @pytest.mark.parametrize(
        ("lanes", "given"),
        [("many", '"many"'), ("0", "0"), ("1.5", "1.5"), ("no", "false"), ("'4'", '"4"')],
    )
    def test_with_alternatives_is_told_once(self, lanes: str, given: str) -> None:
        message, hint = problem(GOOD.replace("data: {", f"data: {{lanes: {lanes}, "))
        assert message == (
            f"job.yaml, line 4: data.lanes is {given}, but must be a whole number above 0 or auto"
        )
        assert hint is not None

    @pytest.mark.parametrize(
        ("size", "hint"),
        [
            ("5 GB", "write stream_memory: 5 GiB"),
            ("512m", "write stream_memory: 512 MiB"),
            ("lots", "write for example stream_memory: 1 GiB"),
            ("0 MiB", "write for example stream_memory: 1 GiB"),
            ("1.5", "write for example stream_memory: 1 GiB"),
        ],
    )
    def test_as_a_size_is_told_with_the_units(self, size: str, hint: str) -> None:
        message, given_hint = problem(GOOD.replace("data: {", f"data: {{stream_memory: {size}, "))
        assert "must be a size such as 512 MiB" in message
        assert given_hint == hint

    def test_with_a_password_is_not_shown(self) -> None:
        store = "store: {uri: s3://a, access: {endpoint_url: 'https://me:hunter2@host/'}}"
        message, hint = problem(GOOD.replace("store: s3://shoal/runs", store))
        assert "hunter2" not in message
        assert "must not hold a user or password" in message
        assert hint == "name a profile, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"

    def test_that_is_long_is_cut(self) -> None:
        message, _ = problem(GOOD.replace("name: sentiment", "name: " + "X" * 500))
        assert len(message) < 250


@pytest.mark.usefixtures("in_folder")
class TestAMissingKey:
    def test_is_told_with_an_example(self) -> None:
        assert problems("name: a\n") == [
            (
                "job.yaml: task is missing",
                "add task: {kind: text-classification, labels: [negative, positive]}",
            ),
            ("job.yaml: model is missing", "add model: {source: s3://models/minilm}"),
            ("job.yaml: data is missing", "add data: {train: s3://lake/reviews/train}"),
            ("job.yaml: store is missing", "add store: s3://shoal/runs"),
        ]

    def test_inside_a_group_is_told_with_the_line_of_the_group(self) -> None:
        assert problem(GOOD.replace("{labels: [negative, positive]}", "{text: t}")) == (
            "job.yaml, line 2: task.labels is missing",
            "add task.labels: [negative, positive]",
        )

    def test_of_a_group_that_must_be_there_shows_an_example(self) -> None:
        assert problem(GOOD.replace("task: {labels: [negative, positive]}", "task:")) == (
            "job.yaml, line 2: task is empty, but must be a group of keys",
            "write task: {kind: text-classification, labels: [negative, positive]}",
        )

    def test_of_a_store_names_its_uri(self) -> None:
        assert problems(GOOD.replace("s3://shoal/runs", "{url: s3://shoal/runs}")) == [
            ("job.yaml, line 5: store.uri is missing", "add store.uri: s3://shoal/runs"),
            ("job.yaml, line 5: store.url is not a known key", "did you mean store.uri?"),
        ]


@pytest.mark.usefixtures("in_folder")
def test_early_stopping_needs_a_validation_set() -> None:
    assert problem(GOOD + "train: {early_stopping: {}}\n") == (
        "job.yaml: train.early_stopping needs a validation set, but data.validation is not given",
        "give data.validation the folder of the set, or remove train.early_stopping",
    )


@pytest.mark.usefixtures("in_folder")
def test_all_problems_of_all_kinds_are_told_at_once() -> None:
    text = """\
nmae: sentiment
task: {kind: foo, labels: [a]}
model: {source: 7}
data: {train: s3://lake/reviews/train, lanes: many}
optimizer: {learning_rate: -1, warmup: 3}
train: {early_stopping: {metric: f1}}
store: s3://a
store: s3://b
"""
    found = [message for message, _ in problems(text, "workers.count=0", "train.epochs")]
    assert found == [
        "job.yaml, line 8: store stands twice, first in line 7",
        "--set train.epochs: a path, '=' and a value are needed",
        "job.yaml: name is missing",
        'job.yaml, line 2: task.kind is "foo", but must be text-classification',
        'job.yaml, line 2: task.labels is ["a"], but must be a list of at least 2 texts',
        "job.yaml, line 3: model.source is 7, but must be a text",
        'job.yaml, line 4: data.lanes is "many", but must be a whole number above 0 or auto',
        "job.yaml, line 5: optimizer.learning_rate is -1, but must be a number above 0",
        "job.yaml, line 5: optimizer.warmup is not a known key",
        'job.yaml, line 6: train.early_stopping.metric is "f1", but must be validation/loss, '
        "validation/accuracy, validation/f1, validation/precision or validation/recall",
        "--set workers.count=0: workers.count is 0, but must be a whole number above 0",
        "job.yaml, line 1: nmae is not a known key",
        "job.yaml: train.early_stopping needs a validation set, but data.validation is not given",
    ]


def test_problems_are_printed_with_their_hints() -> None:
    error = SpecError(Problem("one is wrong", "write two"), Problem("three is wrong"))
    assert render_error(error) == (
        "error: one is wrong\n\nhint: write two\n\nerror: three is wrong"
    )


# ---------------------------------------------------------------------------------- search

STUDY = GOOD.replace("data: {", "data: {validation: s3://lake/reviews/validation, ")


def search_of(text: str, *overrides: str) -> Search:
    search = load(STUDY + text, *overrides).search
    assert search is not None
    return search


@pytest.mark.usefixtures("in_folder")
class TestSearch:
    def test_is_none_where_it_is_not_given_and_changes_nothing(self) -> None:
        assert load(GOOD).search is None
        assert load(STUDY).digests() == load(STUDY + "search: {trials: 3}\n").digests()

    def test_has_defaults_for_all_of_its_keys(self) -> None:
        search = search_of("search: {}\n")
        assert (search.metric, search.mode, search.score) == ("validation/loss", "min", "best")
        assert (search.algorithm, search.scheduler) == (TPESearch(), ASHA())
        assert (search.trials, search.max_concurrent) == (64, "auto")
        assert search.finalists == Finalists(count=3, seeds=3)
        assert "optimizer.learning_rate" in search.space

    def test_of_a_grid_has_as_many_trials_as_combinations(self) -> None:
        space = "{model.dropout: {grid: [0, 0.1, 0.2]}, optimizer.weight_decay: {grid: [0, 0.1]}}"
        text = f"search: {{algorithm: grid, space: {space}}}\n"
        assert search_of(text).trials == 6
        assert search_of(text).configurations == 7  # with the job's own values
        assert search_of(text, "search.baseline=false").configurations == 6
        assert search_of(text, "search.trials=4").trials == 4

    def test_takes_kinds_as_texts_or_as_groups(self) -> None:
        text = "search: {algorithm: random, scheduler: {kind: median, startup_trials: 2}}\n"
        assert search_of(text).algorithm.kind == "random"
        assert search_of(text).scheduler == MedianStopping(startup_trials=2)
        assert search_of(text, "search.scheduler=null").scheduler.kind == "none"
        assert search_of(text, "search.scheduler=none").scheduler.kind == "none"

    def test_compares_trials_by_what_early_stopping_watches(self) -> None:
        stopping = "train: {early_stopping: {metric: validation/accuracy}}\n"
        search = search_of(stopping + "search: {}\n")
        assert (search.metric, search.mode) == ("validation/accuracy", "max")
        least = stopping.replace("}}", ", mode: min}}")
        assert search_of(least + "search: {}\n").mode == "min"
        assert search_of(stopping + "search: {metric: validation/accuracy}\n").mode == "max"
        message, hint = problem(STUDY + stopping + "search: {metric: validation/f1}\n")
        assert message == (
            "job.yaml: search compares trials by the max of validation/f1, but "
            "train.early_stopping, by which a trial keeps its best checkpoint, watches the max of "
            "validation/accuracy"
        )
        assert hint is not None
        assert hint.startswith("remove search.metric")

    def test_of_a_metric_knows_whether_more_is_better(self) -> None:
        assert search_of("search: {metric: validation/f1}\n").mode == "max"
        assert search_of("search: {metric: validation/loss}\n").mode == "min"
        assert search_of("search: {metric: validation/f1, mode: min}\n").mode == "min"

    def test_needs_a_validation_set(self) -> None:
        assert problem(GOOD + "search: {}\n") == (
            "job.yaml: search needs a validation set, but data.validation is not given",
            "give data.validation the folder of the set, or remove search",
        )

    def test_may_be_changed_key_by_key(self) -> None:
        path = "search.space.optimizer.learning_rate"
        text = "search: {space: {model.dropout: {uniform: [0, 0.1]}}}\n"
        search = search_of(text, f"{path}={{loguniform: [1e-5, 1e-4]}}", "search.trials=9")
        assert list(search.space) == ["model.dropout", "optimizer.learning_rate"]
        assert search.space["optimizer.learning_rate"].loguniform == (1e-5, 1e-4)
        assert search.trials == 9
        message, _ = problem(STUDY + text, f"{path}={{uniform: [0, 1]}}")
        assert message == (
            f"--set {path}={{uniform: [0, 1]}}: {path}: optimizer.learning_rate is 0.0, but must "
            "be a number above 0"
        )

    @pytest.mark.parametrize(
        ("text", "message", "hint"),
        [
            (
                "{space: recomended}",
                'search.space is "recomended", but must be recommended or a group of keys',
                "write space: recommended",
            ),
            (
                "{space: {}}",
                "search.space holds no key",
                "write space: recommended, or for example "
                "space: {optimizer.learning_rate: {loguniform: [1e-6, 1e-3]}}",
            ),
            (
                "{space: {optimizer.learning_rate: {loguniform: [0, 1]}}}",
                "search.space.optimizer.learning_rate has loguniform from 0.0, but numbers that "
                "have a logarithm are above 0",
                "raise the lower end, or write uniform",
            ),
            (
                "{space: {optimizer.learning_rate: {loguniform: [1e-3, 1e-6]}}}",
                "search.space.optimizer.learning_rate has loguniform from 0.001 to 1e-06, but the "
                "first must be below the second",
                "write the lower end first, as in loguniform: [1e-06, 0.001]",
            ),
            (
                "{space: {model.dropout: {quniform: [0, 0.4, 0.5]}}}",
                "search.space.model.dropout has quniform with a step of 0.5, but it must be above "
                "0 and at most 0.4, the width of the range",
                "change the third number",
            ),
            (
                "{space: {model.dropout: {uniform: [0, 0.4], choice: [0]}}}",
                "search.space.model.dropout has uniform and choice",
                "give one of uniform, loguniform, quniform, qloguniform, integer, log-integer, "
                "choice, grid",
            ),
            (
                "{space: {model.dropout: {when: {optimizer.kind: sgd}}}}",
                "search.space.model.dropout says nothing about its values",
                "give one of uniform, loguniform, quniform, qloguniform, integer, log-integer, "
                "choice, grid",
            ),
            (
                "{space: {model.dropout: {choice: [0.1, 0.1]}}}",
                "search.space.model.dropout lists 0.1 twice",
                "remove the second",
            ),
            (
                "{space: {model.dropout: {lognormal: [0, 1]}}}",
                "search.space.model.dropout.lognormal is not a known key",
                "did you mean search.space.model.dropout.loguniform?",
            ),
            (
                "{space: {model.dropout: {grid: [0, 0.1]}}}",
                "search has algorithm tpe, but model.dropout is given by grid: grids are for "
                "algorithm grid, which takes nothing else",
                "give model.dropout as choice: [...], or choose algorithm grid for all keys",
            ),
            (
                "{space: {model.dropout: {choice: [0, 0.1]}}, algorithm: grid}",
                "search has algorithm grid, but model.dropout is given by choice: grids are for "
                "algorithm grid, which takes nothing else",
                "give model.dropout as grid: [...], or choose algorithm tpe",
            ),
            (
                "{space: {model.dropout: {choice: [0, 0.1]}}, algorithm: cmaes}",
                "search has algorithm cmaes, which searches numbers, but the space has none that "
                "every trial has",
                "choose algorithm tpe, or add a key with a range and without when",
            ),
            (
                "{algorithm: tpee}",
                'search.algorithm.kind is "tpee", but must be random or grid or tpe or gp or cmaes',
                "write kind: tpe",
            ),
            (
                "{algorithm: {kind: random, startup_trials: 4}}",
                "search.algorithm.startup_trials belongs to search.algorithm.kind gp, but "
                "search.algorithm.kind is random",
                "write search.algorithm.kind: gp, or keep random alone: "
                "--set 'search.algorithm={kind: random}'",
            ),
            (
                "{metric: f1}",
                'search.metric is "f1", but must be validation/loss, validation/accuracy, '
                "validation/f1, validation/precision or validation/recall",
                "write metric: validation/f1",
            ),
            (
                "{scheduler: {kind: asha, reduction_factor: 1}}",
                "search.scheduler.reduction_factor is 1, but must be a whole number of at least 2",
                None,
            ),
            *(
                (
                    f"{{scheduler: {{kind: {kind}, first: 0.4, reduction_factor: 3}}}}",
                    "search.scheduler has first 0.4, but the last rung before the end of a trial's "
                    "budget is at 1 / reduction_factor (0.333), so that no trial would be stopped",
                    "remove first, lower reduction_factor, or choose scheduler none",
                )
                for kind in ("asha", "hyperband")
            ),
            (
                "{trials: 0}",
                "search.trials is 0, but must be a whole number above 0",
                "write for example trials: 64",
            ),
            (
                "{scheduler: pbt, space: {batching.global_batch_size: {choice: [8, 16]}}}",
                "search has scheduler pbt and searches batching.global_batch_size, but a clone "
                "goes on in the middle of another trial, where batching.global_batch_size cannot "
                "change",
                "search optimizer.learning_rate, optimizer.weight_decay, optimizer.betas, "
                "optimizer.epsilon, optimizer.momentum, optimizer.max_grad_norm, "
                "optimizer.layer_decay, model.dropout, model.adapter.dropout, "
                "task.label_smoothing alone, or choose scheduler asha",
            ),
            (
                "{scheduler: pbt, trials: 3}",
                "search has 3 trials, but the population of pbt is 8, and all other trials are its "
                "clones",
                "remove search.trials, or set search.scheduler.population to 3",
            ),
            (
                "{scheduler: pb2, repeats: 2}",
                "search has scheduler pb2 and repeats, but a clone's values are only the last part "
                "of how it was trained, which no other trial repeats",
                "remove search.repeats, or choose scheduler none",
            ),
            *(
                (
                    f"{{scheduler: {kind}, repeats: 2}}",
                    f"search has repeats 2, but scheduler {kind} would stop each seed by itself, "
                    "so that the mean over seeds would tell how far they came",
                    "remove search.repeats: search.finalists trains the best values with several "
                    "seeds; or choose scheduler none",
                )
                for kind in ("asha", "hyperband", "median")
            ),
            (
                "{scheduler: pb2, space: {model.dropout: {choice: [0, 0.1]}}}",
                "search has scheduler pb2, which chooses numbers, but the space has choices alone",
                "choose scheduler pbt, or give a key a range",
            ),
            (
                "{scheduler: pbt, algorithm: grid, space: {model.dropout: {grid: [0, 0.1]}}}",
                "search has scheduler pbt, which changes the values of trials, but algorithm grid, "
                "which is to try each combination",
                "choose algorithm random, or scheduler asha",
            ),
        ],
    )
    def test_that_cannot_work_says_so_in_its_line(
        self, text: str, message: str, hint: str | None
    ) -> None:
        assert problem(STUDY + f"search: {text}\n") == (f"job.yaml, line 6: {message}", hint)

    @pytest.mark.parametrize(
        ("text", "message", "hint"),
        [
            (
                "search: {gpu_share: 0.5}",
                "search.gpu_share is 0.5, but workers.gpus is 0",
                "set workers.gpus to 1, or remove search.gpu_share",
            ),
            (
                "search: {gpu_share: 0.5}\nworkers: {gpus: 1, count: 2}",
                "search.gpu_share is 0.5, but a trial has 2 workers, each of which needs a GPU to "
                "itself (NCCL connects no two of one GPU)",
                "set workers.count to 1, or remove search.gpu_share",
            ),
            (
                "search: {budget: {gpu_hours: 8}}",
                "search.budget.gpu_hours is 8, but workers.gpus is 0, so that it would never be "
                "used up",
                "set workers.gpus to 1, or bound the search by search.budget.hours or .epochs",
            ),
            (
                "search: {trials: 3}\nworkers: {count: 4, min: 2}",
                "search gives each trial room for workers.count (4) workers, but workers.min is 2: "
                "trials are not elastic",
                "remove workers.min",
            ),
        ],
    )
    def test_with_workers_that_do_not_suit_it_says_so(
        self, text: str, message: str, hint: str
    ) -> None:
        assert problem(f"{STUDY}{text}\n") == (f"job.yaml: {message}", hint)

    def test_shares_a_gpu_that_there_is(self) -> None:
        assert search_of("workers: {gpus: 1}\nsearch: {gpu_share: 0.5}\n").gpu_share == 0.5
        spec = load(STUDY + "workers: {gpus: 1}\nsearch: {gpu_share: 0.5}\n")
        assert spec.gpus_held == 0.5
        assert load(STUDY + "workers: {gpus: 1, count: 3}\nsearch: {}\n").gpus_held == 3
        message, _ = problem(STUDY + "workers: {gpus: 1}\nsearch: {gpu_share: 1.5}\n")
        assert message.startswith("job.yaml, line 7: search.gpu_share is 1.5, but must be a number")


# ------------------------------------------------------------------------------- overrides


@pytest.mark.usefixtures("in_folder")
class TestSet:
    def test_changes_a_leaf_with_its_type(self) -> None:
        spec = load(GOOD, "optimizer.learning_rate=1e-4", "workers.count=3", "train.log_rows=true")
        assert spec.optimizer.learning_rate == 1e-4
        assert spec.workers.count == 3
        assert spec.train.log_rows is True

    def test_reaches_into_a_group_that_the_file_does_not_hold(self) -> None:
        spec = load(GOOD, "data.validation=v", "train.early_stopping.patience=7")
        assert spec.train.early_stopping is not None
        assert spec.train.early_stopping.patience == 7

    def test_reaches_into_a_group_that_the_file_leaves_empty(self) -> None:
        assert (
            load(GOOD + "batching:\n", "batching.global_batch_size=8").batching
            == load(GOOD, "batching={global_batch_size: 8}").batching
        )

    def test_reaches_into_a_store_that_is_written_as_a_text(self) -> None:
        spec = load(GOOD, "store.access.region=eu-west-1")
        assert spec.store.uri == "s3://shoal/runs"
        assert spec.store.access.region == "eu-west-1"

    def test_takes_lists_texts_with_colons_and_equals_and_null(self) -> None:
        spec = load(
            GOOD,
            "task.labels=[a, b, c]",
            "model.source=s3://models/x=y",
            "optimizer.max_grad_norm=null",
        )
        assert spec.task.labels == ("a", "b", "c")
        assert spec.model.source == "s3://models/x=y"
        assert spec.optimizer.max_grad_norm is None

    def test_the_last_of_two_counts(self) -> None:
        assert load(GOOD, "train.epochs=1", "train.epochs=2").train.epochs == 2

    @pytest.mark.parametrize("override", ["train.epochs", "=3", "train..epochs=3", ".epochs=3", ""])
    def test_without_a_path_or_a_value_says_what_to_write(self, override: str) -> None:
        assert problem(GOOD, override) == (
            f"--set {override}: a path, '=' and a value are needed",
            "write --set optimizer.learning_rate=1e-4",
        )

    def test_of_an_unknown_path_names_the_nearest_one(self) -> None:
        assert problem(GOOD, "optimiser.learning_rate=1e-4") == (
            "--set optimiser.learning_rate=1e-4: optimiser is not a known key",
            "did you mean optimizer?",
        )

    def test_of_a_wrong_value_names_itself_and_not_the_file(self) -> None:
        assert problem(GOOD + "workers: {count: 2}\n", "workers.count=two") == (
            '--set workers.count=two: workers.count is "two", but must be a whole number above 0',
            "write for example count: 1",
        )

    def test_inside_a_list_says_to_set_the_whole_list(self) -> None:
        assert problem(GOOD, "task.labels.0=a") == (
            "--set task.labels.0=a: task.labels is a list, not a group of keys",
            'set the whole list: --set \'task.labels=["negative", "positive"]\'',
        )

    def test_inside_a_single_value_says_so(self) -> None:
        message, _ = problem(GOOD, "name.first=a")
        assert message == '--set name.first=a: name is "sentiment", not a group of keys'

    def test_of_a_value_that_is_no_yaml_says_so(self) -> None:
        message, _ = problem(GOOD, "task.labels=[a, b")
        assert message.startswith("--set task.labels=[a, b, line 1: what opens here is not closed")

    def test_leaves_the_given_tree_as_it_was(self) -> None:
        tree = {"a": {"b": 1}}
        assert apply_overrides(tree, ["a.b=2"]) == {"a": {"b": 2}}
        assert tree == {"a": {"b": 1}}


# --------------------------------------------------------------------------------- other ways in


def test_a_spec_of_a_run_folder_that_is_wrong_names_its_place() -> None:
    with pytest.raises(SpecError, match=r"spec\.json: task is missing"):
        recorded_spec(json.dumps({"name": "a"}))


def test_a_tree_with_lists_and_one_with_tuples_give_the_same_spec() -> None:
    tree = {
        "name": "a",
        "model": {"source": "m"},
        "data": {"train": "t"},
        "store": "runs",
    }
    as_list = parse_spec(tree | {"task": {"labels": ["x", "y"]}}, where="test")
    as_tuple = parse_spec(tree | {"task": {"labels": ("x", "y")}}, where="test")
    assert as_list == as_tuple
