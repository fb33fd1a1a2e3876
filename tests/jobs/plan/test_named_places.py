"""Places on the command line: no secret is repeated, each has one spelling, and the plan lists what it leaves out."""

import os

import pytest

from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import check_place, load_plan
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import blocksight, config_of, run_here
from tests.jobs.tiny import MODEL, folder_of_images

SECRET = "wJalrXUtnFEMI"
URIS = (f"s3://user:{SECRET}@bucket/place", f"s3://bucket/place?X-Amz-Signature={SECRET}", f"https://{SECRET}@host/x")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    base = tmp_path_factory.mktemp("finished")
    run_here(folder_of_images(base / "in", 3, bad=False), base / "out")
    return base


COMMANDS = {
    "data": "plan --data {} --output new",
    "output": "plan --data {in} --output {}",
    "weights": "plan --data {in} --output new --weights {}",
    "endpoint": "plan --data s3://bucket/d --output new --endpoint-url {}",
    "status": "status {}",
    "verify": "verify {}",
    "show": "show {} key",
    "show against": "show {out} ant/000.png --against {}",
    "report": "report {}",
    "sql": "sql {}",
    "export": "export {} spotlight folder",
    "export into": "export {out} spotlight {}",
    "truth": "evaluate {out} --metrics ebpg --truth {}",
    "evaluate": "evaluate {}",
    "audit": "audit {}",
    "compare": "compare {} {out}",
    "store": "compare {out} --store {}",
    "versus": "versus {out} {} --output new",
    "difference": "versus {out} {out} --output {}",
    "bank": "bank --data {in} --model {model} --output {}",
    "weights again": "evaluate {out} --model {model} --weights {}",
    "retry": "retry {}",
    "finalize": "finalize {}",
    "gc": "gc {}",
}


@pytest.mark.parametrize("option", COMMANDS)
def test_a_secret_in_a_uri_is_refused_and_not_repeated(finished, tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    for uri in URIS:
        places = {"{}": uri, "{in}": finished / "in", "{out}": finished / "out", "{model}": MODEL}
        done = blocksight(*(places.get(word, word) for word in COMMANDS[option].split()))
        assert done.returncode == 2, done
        assert SECRET not in done.stdout + done.stderr


def test_the_plan_lists_links_and_pipes(finished, tmp_path):
    data = folder_of_images(tmp_path / "in.v1", 3, bad=False)
    (data / "dog").symlink_to(finished / "in")
    (data / "back").symlink_to(data)
    os.mkfifo(data / "pipe.png")
    done = blocksight("plan", "--data", data, "--output", tmp_path / "out")
    assert done.returncode == 0
    printed = " ".join(done.stdout.split())
    assert "links to folders, followed (1): dog" in printed
    assert "links, broken or not followed (1): back" in printed
    assert "1 pipes" in printed


def test_one_place_in_many_spellings_is_one_job(finished, monkeypatch):
    before = load_plan(LocalStore(finished / "out"))
    monkeypatch.chdir(finished)
    for data in (f"{finished}/in/", f"file://{finished}/in//", "in", "./in/", f"{finished}/out/../in"):
        outcome = run_here(data, f"file://{finished}/out/")
        assert outcome.job_state.plan.fingerprint == before.fingerprint
    assert config_of("s3://bucket/d/", "s3://bucket/out//").data == "s3://bucket/d"


@pytest.mark.parametrize("output", ["{0}/in/out", "{0}/in/../in", "file://{0}/in/out/", "{0}/link/out", "{0}"])
def test_an_output_in_the_data_is_seen(finished, tmp_path, output):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(ConfigError, match="contain each other"):
        check_place(output.format(tmp_path), {"data": f"{tmp_path}/in"})


def test_a_whole_bucket_is_no_output():
    for output in ("s3://bucket", "s3://bucket//"):
        with pytest.raises(ConfigError, match="is a whole bucket"):
            check_place(output, {})
