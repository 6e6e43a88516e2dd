"""Converts foreign data sets to episodes of wamjax; the command is `wamjax.ingest`.

* `guess`: detects the format of files
* `reader`: the protocol that every format implements; each format is a file in `formats`
* `terms`, `rotations`: which numbers become the state and the action, and in which representation
* `signals`: infers from the numbers the gripper's convention, and whether actions are deltas
* `steps`: which steps remain: how observations pair with actions, no-ops, another rate, the end
* `convert`: converts one episode
* `run`: converts all of them in several processes, and resumes after an interruption
* `video`, `hdf5`, `tfrecord`: containers that formats share
"""
