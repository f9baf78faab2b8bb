"""Stand-ins for the programs that launch.pod calls, which fail on order."""

import json
import os
import sys
import warnings
from pathlib import Path

from absl import flags
from absl.testing import flagsaver

from launch import command, pod

ROOT = Path(__file__).parent.parent.parent

# Writes down how it was called. What it answers: the first rule that matches and is not used up;
# else a Google that gives slices at once, and workers whose training ends well.
STAND_IN = """#!{python} -SE
import json, os, re, sys
folder = {folder!r}
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
line = " ".join(words)
with open(folder + "/calls", "a") as file:
    file.write(json.dumps(words) + "\\n")
def read(name):
    path = folder + "/" + name
    return open(path).read() if os.path.exists(path) else ""
def write(name, text):
    open(folder + "/" + name, "w").write(text)
rules = json.loads(read("rules") or "[]")
for rule in rules:
    fits = rule.get("when", read("state")) == read("state")
    if rule["times"] and fits and re.search(rule["calls"], line):
        rule["times"] -= 1
        write("rules", json.dumps(rules))
        if "state" in rule:
            write("state", rule["state"])
        sys.stdout.write(rule.get("out", ""))
        sys.stderr.write(rule.get("err", ""))
        sys.exit(rule.get("code", 0))
if " describe " in line:
    if not read("state"):
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no such one")
    print(read("state"))
elif " create " in line:
    write("state", "ACTIVE")
elif " delete " in line:
    write("state", ""), write("exit", "")
elif "setsid" in line:
    write("exit", "0")
elif "tail -n" in line:
    print("step 1/1  loss 1.0")
elif "train.exit" in line:
    print(read("exit"))
elif line.startswith("sbatch"):
    print("Submitted batch job 7")
"""

TPU = ["--name=demo", "--zone=us-west4-a", "--accelerator=v5e-16"]
TRAIN = [
    "--config=configs/quickstart.py",
    "--config.train.batch_size=32",
    "--workdir=gs://bucket/demo",
    "--poll_seconds=0.001",
]


class Outside:
    """What is outside of the program: the stand-ins, their orders, and what they were asked."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys
        self._rules = []
        for name in ("gcloud", "sbatch", "squeue", "scancel", "xpk", "kubectl"):
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(STAND_IN.format(python=sys.executable, folder=str(folder)))
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        monkeypatch.chdir(ROOT)

    def order(self, calls, times=1, **answer):
        """The next calls that match get an answer: out, err, code, and a new state of the request.

        With `when`, only while the request is in that state.
        """
        self._rules.append({"calls": calls, "times": times, **answer})
        (self.folder / "rules").write_text(json.dumps(self._rules))

    def launch(self, action, *arguments):
        """launch.pod in this process: exit code, standard output, standard error."""
        words = ["launch.pod", *[action] * bool(action), *arguments]
        self._monkeypatch.setattr(sys, "argv", words)
        with flagsaver.flagsaver():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # as in launch.command
                flags.FLAGS(words)
            code = 0
            try:
                pod.main(action)
            except command.InputError as error:
                code, message = 2, f"error: {error}"
                print(message, file=sys.stderr)
            except SystemExit as ended:
                code = ended.code
            flags.FLAGS.unparse_flags()
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def calls(self):
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self):
        """The gcloud verbs that were called, with what was asked of the workers by ssh."""
        kinds = {"setsid": "start", "tail": "follow", "train.exit": "ask", "uv": "install"}
        found = []
        for words in self.calls():
            verb = words[4]
            if verb == "ssh":
                verb = next(kind for text, kind in kinds.items() if text in " ".join(words))
            found.append(verb)
        return found


SLURM = ["--platform=slurm", "--name=demo", "--nodes=2", "--gpus_per_node=4"]


GKE = ["--platform=gke", "--name=demo", "--zone=us-west4-a", "--cluster=tpus"]
