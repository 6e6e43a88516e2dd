"""From the files that others wrote to a data set of wamjax; the command is `wamjax.ingest`.

* `guess`: which format files are of
* `reader`: the protocol that every format stands behind; a format is a file in `formats`
* `terms`, `rotations`: which numbers become the state and the action, and in which representation
* `signals`: what the numbers say of themselves: gripper convention, delta or absolute
* `steps`: which steps remain: how observations pair with actions, no-ops, another rate, the end
* `convert`: one episode
* `run`: all of them, over processes; killed and continued
* `video`, `hdf5`, `tfrecord`: containers that formats share
"""
