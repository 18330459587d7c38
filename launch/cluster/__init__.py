"""Runs on a Slurm cluster: what is asked of it, the script it runs, the jobs that a run has there.

settings.py   what a user asks for: ~/.config/plait/cluster.yaml, and over it the command's options
batch.py      the batch script from its template, batch.sh.jinja; a user may have another
slurm.py      Slurm's own commands, and what they say
submission.py a run into the queue: checked, frozen, written down
jobs.py       which jobs a run has had, RUN/launch/jobs.jsonl
place.py      inside a job: which of its machines the next life is started on
verdict.py    inside a job: what follows from how a life ended
"""
