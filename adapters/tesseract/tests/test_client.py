"""The HTTP client: what it sends, when it sends again, and what each failure is called."""

import copy
import errno
import multiprocessing
import os
import pickle
import shutil
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from batchrules_tesseract import (
    TesseractClient,
    TesseractConnectionLostError,
    TesseractError,
    TesseractInputError,
    TesseractServerError,
    TesseractTimeoutError,
    TesseractUnreachableError,
    _replicas,
    _shared_folder,
)
from fake import fake_tesseract, half_an_answer, hang_up, trickle
from tesseracts.serving import free_port, serve

X = np.arange(3.0)


@pytest.fixture
def nobody():
    """An address where nothing listens."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.mark.parametrize("encoding", ["base64", "json"])
@pytest.mark.parametrize(
    "x", [X, np.float64(2.0), np.ones((2, 0)), np.arange(6.0).reshape(2, 3).T, np.ones(3, "float32")], ids=np.shape
)
def test_arrays_go_there_and_back(solver, encoding, x):
    with TesseractClient(solver.url, encoding=encoding) as client:
        y = client.apply({"x": x})["y"]
    np.testing.assert_array_equal(y, np.asarray(x, "float64") ** 2 + 1)
    assert y.shape == np.shape(x)


def test_special_numbers_survive(solver):
    x = np.array([np.nan, np.inf, -np.inf, 5e-324])
    with TesseractClient(solver.url) as client:
        np.testing.assert_array_equal(client.apply({"x": x})["y"], x**2 + 1)


def test_a_number_that_json_lacks_is_an_error_and_not_null(solver):
    with TesseractClient(solver.url, encoding="json") as client, pytest.raises(ValueError, match="base64"):
        client.apply({"x": np.array([np.nan])})
    with TesseractClient(solver.url) as client, pytest.raises(ValueError, match=r"'inputs\.delay'"):
        client.apply({"x": X, "delay": float("nan")})


def test_a_large_body(solver):
    x = np.random.default_rng(0).normal(size=1_500_000)
    with TesseractClient(solver.url) as client:
        np.testing.assert_array_equal(client.apply({"x": x})["y"], x**2 + 1)


def test_files_in_a_shared_folder(tmp_path):
    (tmp_path / "in").mkdir()
    with serve("solver", settings={"TESSERACT_INPUT_PATH": str(tmp_path / "in")}) as served:
        folders = {"input_folder": tmp_path / "in", "output_folder": served.output_path}
        with TesseractClient(served.url, encoding="binref", **folders) as client:
            for x in (X, np.float64(2.0), np.ones((0, 2))):
                np.testing.assert_array_equal(client.apply({"x": x})["y"], x**2 + 1)
        assert not list((tmp_path / "in").iterdir())
        assert not list(served.output_path.rglob("*.bin"))


def test_a_file_that_was_not_written_whole_is_removed(fake, tmp_path, monkeypatch):
    class Full:
        def tofile(self, target):
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_shared_folder, "np", SimpleNamespace(ascontiguousarray=lambda _: Full()))
    folders = {"input_folder": tmp_path, "output_folder": tmp_path}
    with (
        TesseractClient(fake.url, encoding="binref", **folders) as client,
        pytest.raises(OSError, match=os.strerror(errno.ENOSPC)),
    ):
        client.apply({"x": X})
    assert not list(tmp_path.iterdir())


def test_the_protocol(recipe):
    inputs = {"x": X, "s": X}
    with TesseractClient(recipe.url) as client:
        assert {"apply", "jacobian", "health"} <= set(client.available_endpoints)
        assert client.health() == {"status": "ok"}
        shape = {"shape": [3], "dtype": "float64"}
        assert client.abstract_eval({"x": shape, "s": shape})["y"] == shape
        assert client.jacobian(inputs, ["x"], ["y"])["y"]["x"].shape == (3, 3)
        tangent = client.jacobian_vector_product(inputs, ["x"], ["y"], {"x": X})["y"]
        np.testing.assert_allclose(tangent, np.cos(X) * X * X)
        cotangent = client.vector_jacobian_product(inputs, ["s"], ["y"], {"y": X})["s"]
        np.testing.assert_allclose(cotangent, np.sin(X) * X)


def test_a_refused_input_names_every_field(solver):
    with TesseractClient(solver.url) as client, pytest.raises(TesseractInputError) as caught:
        client.apply({"delay": "long", "other": 1})
    text = str(caught.value)
    assert all(part in text for part in (solver.url, "apply", "x: Field required", "delay: ", "other: "))


def test_a_failure_carries_the_servers_text(fake):
    fake.status, fake.answers["/apply"] = 500, b"Traceback: no convergence"
    with TesseractClient(fake.url) as client, pytest.raises(TesseractServerError, match=r"500.*no convergence"):
        client.apply({"x": X})


def test_of_a_long_text_the_end_is_told(fake):
    fake.status, fake.answers["/apply"] = 500, b"Traceback" + b"." * 10_000 + b"no convergence"
    with TesseractClient(fake.url) as client, pytest.raises(TesseractServerError, match=r"no convergence$") as caught:
        client.apply({"x": X})
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("status", [201, 302])
def test_an_answer_of_another_status_is_none(fake, status):
    fake.status = status
    with TesseractClient(fake.url) as client, pytest.raises(TesseractServerError, match=f"status {status}"):
        client.apply({"x": X})


@pytest.mark.parametrize(
    ("place", "path"),
    [
        (["body", "inputs", "a", 0, "v"], r"a\.\[0\]\.v"),
        (["body", "inputs", "inputs", "body"], r"inputs\.body"),
        (["body", "a", "inputs"], r"a\.inputs"),
        (["query", "body"], r"query\.body"),
        (["body"], "the request"),
    ],
    ids=str,
)
def test_the_path_of_a_field_that_is_refused(fake, place, path):
    fake.status, fake.answers["/apply"] = 422, {"detail": [{"loc": place, "msg": "wrong"}]}
    with TesseractClient(fake.url) as client, pytest.raises(TesseractInputError, match=rf"\n  {path}: wrong$"):
        client.apply({"x": X})


def test_no_such_endpoint(fixed):
    with TesseractClient(fixed.url) as client, pytest.raises(TesseractServerError, match="404"):
        client.jacobian({}, ["x"], ["y"])


def test_a_server_that_is_not_there(nobody):
    with TesseractClient(nobody, retries=1) as client, pytest.raises(TesseractUnreachableError, match=nobody):
        client.apply({"x": X})


@pytest.mark.parametrize(
    ("options", "pauses"),
    [
        ({"retries": 0}, []),
        ({"retries": 3}, [0.1, 0.2, 0.4]),
        ({"retries": 5, "timeout": None}, [0.1, 0.2, 0.4, 0.8, 1.6]),
        ({"retries": 9, "timeout": 1.0}, [0.1, 0.2, 0.4, 0.8]),
    ],
    ids=str,
)
def test_it_is_tried_again_after_longer_and_longer_pauses_until_the_timeout(nobody, monkeypatch, options, pauses):
    slept = []
    monkeypatch.setattr(_replicas, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append))
    with TesseractClient(nobody, **options) as client, pytest.raises(TesseractUnreachableError):
        client.apply({"x": X})
    np.testing.assert_allclose(slept, pauses)


@pytest.mark.parametrize("breaks", [hang_up, half_an_answer])
def test_a_request_that_may_have_run_is_not_sent_again(fake, breaks):
    fake.answers["/apply"] = breaks
    with TesseractClient(fake.url) as client, pytest.raises(TesseractConnectionLostError, match=fake.url):
        client.apply({"x": X})
    assert fake.posts() == ["/apply"]


def test_it_is_sent_again_if_asked(fake):
    fake.answers["/apply"] = hang_up
    with TesseractClient(fake.url, resend=2) as client, pytest.raises(TesseractConnectionLostError):
        client.apply({"x": X})
    assert fake.posts() == ["/apply"] * 3


def test_a_worker_that_dies_takes_no_other_with_it(doomed):
    with TesseractClient(doomed.url) as client:
        with pytest.raises(TesseractConnectionLostError):
            client.apply({"x": np.float64(-3.0)})
        assert doomed.calls() == {"apply": 1}
        assert client.apply({"x": np.float64(1.0)})["y"] == 2.0


def test_a_worker_that_hangs(doomed):
    started = time.monotonic()
    with TesseractClient(doomed.url, timeout=0.5) as client, pytest.raises(TesseractTimeoutError, match=r"0\.5 s"):
        client.apply({"x": np.float64(-2.0)})
    assert time.monotonic() - started < 10


def test_an_answer_that_trickles_in_is_late_too(fake):
    fake.answers["/apply"] = trickle
    with TesseractClient(fake.url, timeout=0.3) as client, pytest.raises(TesseractTimeoutError):
        client.apply({"x": X})
    # It was not waited for until it ended.
    assert 0 < fake.trickled < 60


@pytest.fixture
def connections(fake):
    """The connections that requests come by; the first is answered with status 500 if that is asked for."""
    seen = []

    def answer(handler):
        seen.append(handler.client_address)
        handler.reply({"y": 1}, 500 if fake.status == 500 and len(seen) == 1 else 200)

    fake.answers["/apply"] = answer
    return seen


def test_a_connection_is_kept(fake, connections):
    with TesseractClient(fake.url) as client:
        for _ in range(3):
            client.apply({})
    assert len(connections) == 3
    assert len(set(connections)) == 1


def test_a_connection_that_idled_is_not_used_again(fake, connections):
    with TesseractClient(fake.url, max_idle=0.05) as client:
        client.apply({})
        time.sleep(0.1)
        client.apply({})
    assert len(set(connections)) == 2


def test_a_connection_that_a_failure_came_by_is_not_used_again(fake, connections):
    """Uvicorn closes it after an exception, and does not say so."""
    fake.status = 500
    with TesseractClient(fake.url) as client:
        with pytest.raises(TesseractServerError):
            client.apply({})
        client.apply({})
    assert len(set(connections)) == 2


def test_headers(fake):
    count = iter(range(10))
    with TesseractClient(fake.url, headers=lambda: {"X-Token": f"t{next(count)}"}) as client:
        client.apply({"x": X})
        client.apply({"x": X})
    assert [headers["X-Token"] for _, headers in fake.asked] == ["t0", "t1"]
    assert fake.asked[0][1]["Accept"] == "application/json+base64"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for this machine, signed by itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate, and is not installed")
    target = tmp_path_factory.mktemp("tls") / "own.pem"
    key = target.with_name("key.pem")
    request = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", target]
    names = ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*request, *names], check=True, capture_output=True)
    return target, key


def test_tls(certificate):
    with fake_tesseract(certificate) as secure:
        with TesseractClient(secure.url) as client, pytest.raises(TesseractError, match="verify_tls"):
            client.apply({"x": X})
        context = ssl.create_default_context(cafile=certificate[0])
        for trusted in (certificate[0], str(certificate[0]), context):
            with TesseractClient(secure.url, verify_tls=trusted) as client:
                client.apply({"x": X})
        with TesseractClient(secure.url, verify_tls=False) as client:
            client.apply({"x": X})
    assert secure.posts() == ["/apply"] * 4


def test_replicas_share_the_work(fake):
    with fake_tesseract() as other, TesseractClient([fake.url, other.url]) as client:
        for server in (fake, other):
            server.answers["/apply"] = lambda handler: (time.sleep(0.05), handler.reply({"y": 1}, 200))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: client.apply({}), range(8)))
        assert len(fake.posts()) == len(other.posts()) == 4


def test_the_least_busy_replica_is_chosen(fake):
    free = threading.Event()
    fake.answers["/apply"] = lambda handler: (free.wait(10), handler.reply({"y": 1}, 200))
    with fake_tesseract() as other, TesseractClient([fake.url, other.url]) as client, ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(client.apply, {})
        while client._replicas.servers[0].in_flight == 0:  # noqa: SLF001  # nothing else tells that a request is under way
            time.sleep(0.01)
        for _ in range(3):
            client.apply({})
        assert len(other.posts()) == 3
        free.set()
        stuck.result()


def test_a_replica_that_is_down_is_left_out(fake, nobody):
    with TesseractClient([nobody, fake.url]) as client:
        for _ in range(4):
            client.apply({"x": X})
    assert fake.posts() == ["/apply"] * 4


@pytest.mark.parametrize(("seconds", "times"), [(60.0, 1), (0.0, 4)])
def test_a_replica_that_is_down_is_asked_again_after_a_while_only(fake, nobody, monkeypatch, seconds, times):
    monkeypatch.setattr(_replicas, "_DOWN_SECONDS", seconds)
    asked = []
    with TesseractClient([nobody, fake.url]) as client:
        down = client._replicas.servers[0]  # noqa: SLF001  # nothing else tells of a connection that was not made
        send = down.send
        monkeypatch.setattr(down, "send", lambda request: (asked.append(request), send(request)))
        for _ in range(4):
            client.apply({"x": X})
    assert len(asked) == times


def test_a_replica_that_is_there_has_the_schema_and_is_well(fake, nobody):
    with TesseractClient([nobody, fake.url]) as client:
        assert client.openapi_schema == fake.schema
        assert client.health() == {"status": "ok"}


def test_a_schema_that_no_one_has(nobody):
    with TesseractClient(nobody) as client, pytest.raises(TesseractUnreachableError, match=nobody):
        client.openapi_schema  # noqa: B018  # reading it is the test


def test_no_replica_is_there(nobody):
    other = f"http://127.0.0.1:{free_port()}"
    with TesseractClient([nobody, other], retries=0) as client, pytest.raises(TesseractUnreachableError) as caught:
        client.apply({"x": X})
    assert nobody in str(caught.value)
    assert other in str(caught.value)


def test_replicas_must_serve_the_same_tesseract(solver, recipe):
    with TesseractClient([solver.url, recipe.url]) as client, pytest.raises(TesseractError, match="differ"):
        client.openapi_schema  # noqa: B018  # reading it is the test


def test_replicas_of_the_same_endpoints_must_take_the_same_inputs(fake):
    with fake_tesseract() as other:
        other.schema = copy.deepcopy(fake.schema)
        with TesseractClient([fake.url, other.url]) as client:
            assert client.openapi_schema == fake.schema
        del other.schema["components"]["schemas"]["Apply_InputSchema"]["properties"]["x"]
        with TesseractClient([fake.url, other.url]) as client, pytest.raises(TesseractError, match="differ"):
            client.openapi_schema  # noqa: B018  # reading it is the test


def test_something_that_is_no_tesseract(fake):
    fake.schema = {"openapi": "3.1.0", "paths": {}}
    with TesseractClient(fake.url) as client, pytest.raises(TesseractError, match="no Tesseract"):
        client.openapi_schema  # noqa: B018  # reading it is the test


def test_a_path_in_the_url(fake):
    fake.answers["/behind/proxy/apply"] = {"y": 1}
    with TesseractClient(f"{fake.url}/behind/proxy/") as client:
        assert client.apply({}) == {"y": 1}


def test_a_closed_client_opens_again(fake):
    client = TesseractClient(fake.url)
    client.apply({"x": X})
    client.close()
    client.apply({"x": X})
    client.close()


def test_a_pickled_client_works(fake):
    with TesseractClient(fake.url, timeout=5.0) as client, pickle.loads(pickle.dumps(client)) as other:  # noqa: S301  # its own pickle
        other.apply({"x": X})
        assert other.urls == client.urls
        assert other._settings == client._settings  # noqa: SLF001  # options have no public name


def _applies(client):
    return client.apply({"x": X})["y"].tolist()


def test_in_another_process(solver):
    with TesseractClient(solver.url) as client, multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_applies, (client,)) == [1.0, 2.0, 5.0]


def test_many_threads(solver):
    xs = [np.full(2, float(i)) for i in range(60)]
    with TesseractClient(solver.url) as client, ThreadPoolExecutor(12) as pool:
        results = list(pool.map(lambda x: client.apply({"x": x})["y"], xs))
    for x, y in zip(xs, results, strict=True):
        np.testing.assert_array_equal(y, x**2 + 1)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"timeout": 0}, ValueError, "timeout"),
        ({"timeout": "1"}, TypeError, "timeout"),
        ({"timeout": float("inf")}, ValueError, "timeout must be more than 0 seconds; got inf"),
        ({"timeout": float("nan")}, ValueError, "timeout must be more than 0 seconds; got nan"),
        ({"timeout": True}, TypeError, "timeout must be a number of seconds; got True"),
        ({"retries": True}, TypeError, "retries must be a whole number; got True"),
        ({"connect_timeout": -1.0}, ValueError, "connect_timeout"),
        ({"retries": -1}, ValueError, "retries"),
        ({"resend": 1.5}, TypeError, "resend"),
        ({"max_connections": 0}, ValueError, "max_connections"),
        ({"encoding": "pickle"}, ValueError, "'base64', 'json', 'binref'"),
        ({"encoding": "binref"}, ValueError, "input_folder and output_folder"),
        (
            {"encoding": "binref", "input_folder": "/nowhere", "output_folder": "/nowhere"},
            ValueError,
            "existing folder",
        ),
        ({"input_folder": "/nowhere"}, ValueError, "encoding='binref'"),
        ({"headers": "X: y"}, TypeError, "headers"),
        ({"verify_tls": 3}, TypeError, "verify_tls"),
        ({"verify_tls": "/nowhere.pem"}, ValueError, "verify_tls is '/nowhere.pem'.*No such file"),
        ({"verify_tls": __file__}, ValueError, "verify_tls is .*test_client.py.*certificate"),
    ],
)
def test_a_bad_option(options, kind, text):
    with pytest.raises(kind, match=text):
        TesseractClient("https://localhost:8000", **options)


@pytest.mark.parametrize(
    ("urls", "kind"),
    [([], TypeError), (3, TypeError), ([3], TypeError), ("ftp://x", ValueError), ("http://", ValueError)],
)
def test_a_bad_url(urls, kind):
    with pytest.raises(kind, match="URL"):
        TesseractClient(urls)
