"""Serves the policy of a bundle to robots, over websockets and HTTP on one port.

    python -m wamjax.serve --bundle=bundles/quickstart
    python -m wamjax.serve --bundle=bundles/quickstart --names=libero --max_batch=16
    python -m wamjax.serve --bundle=bundles/quickstart --host=0.0.0.0 --key_file=key.txt

openpi clients and `wamjax.serving.Client` connect over websockets; OpenVLA clients use ``POST
/act``. Everything is compiled before the port opens. See docs/robot.md.
"""

from __future__ import annotations

import logging

from absl import app, flags

from wamjax import cli

WAIT_MS = 5.0


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    flags.DEFINE_string("bundle", None, "output folder of wamjax.export_policy", required=True)
    flags.DEFINE_list("mode", [], "modes to serve, the default first; the bundle's mode by default")
    flags.DEFINE_string(
        "host", "127.0.0.1", "address to listen on; others than loopback need --key_file"
    )
    flags.DEFINE_integer("port", 8000, "port; 0 = any free port", lower_bound=0, upper_bound=65535)
    flags.DEFINE_string("key_file", "", "file with the API key that clients must send")
    flags.DEFINE_string("cert_file", None, "certificate chain in PEM, for TLS")
    flags.DEFINE_string("cert_key_file", None, "private key of the certificate")
    flags.DEFINE_list(
        "names", [], "libero, droid, aloha, openvla, openvla_oft, or KEY=CAMERA pairs"
    )
    flags.DEFINE_string("instruction", "", "instruction for clients that send none")
    flags.DEFINE_integer("max_batch", 8, "maximum clients per policy call", lower_bound=1)
    flags.DEFINE_float(
        "max_wait_ms",
        WAIT_MS,
        "milliseconds a client waits for others to fill a batch",
        lower_bound=0,
    )
    flags.DEFINE_integer("max_clients", 64, "maximum clients at once", lower_bound=1)
    flags.DEFINE_float("max_message_mb", 8.0, "maximum size of an observation", lower_bound=0.001)
    flags.DEFINE_float(
        "max_rate", 200.0, "maximum observations per second and client", lower_bound=0.01
    )
    flags.DEFINE_integer("max_pixels", 2**22, "maximum pixels per picture", lower_bound=1)
    flags.DEFINE_float(
        "max_far", None, "reject states more than N ranges away from the demonstrations"
    )
    flags.DEFINE_float(
        "drain_s", 10.0, "seconds a stopping server has to answer waiting requests", lower_bound=0
    )
    flags.DEFINE_integer("seed", 0, "seed of the sampling noise")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    options = flags.FLAGS
    if bool(options.cert_file) != bool(options.cert_key_file):
        raise app.UsageError("TLS needs --cert_file and --cert_key_file")
    try:
        from wamjax.serving import server
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'wamjax[serve]'") from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.captureWarnings(True)
    key = server.read_key(options.key_file, options.host)
    with server.bind(options.host, options.port) as sock:
        scheme = "wss" if options.cert_file else "ws"
        server.Server(
            _application(options, key), sock,
            greeting=f"serving {options.bundle} at {scheme}://{server.address(sock)}",
            ssl_certfile=options.cert_file, ssl_keyfile=options.cert_key_file,
        ).run()  # fmt: skip
    print("ended", flush=True)


def _application(options, key: str):
    """Loads and compiles the policies for the options."""
    from wamjax.bundle.policy import Limits, load_policy
    from wamjax.serving import about, names, server, worker

    limits = Limits() if options.max_far is None else Limits(far=options.max_far)
    first = load_policy(options.bundle, mode=next(iter(options.mode), None), limits=limits)
    policies = {first.mode: first} | {mode: first.with_mode(mode) for mode in options.mode[1:]}
    cameras = tuple(first.manifest.spec.cameras)
    tables = names.tables(options.names, cameras, bundle=options.bundle)
    reader = names.Names(tables, options.instruction, options.max_pixels)
    batching = worker.Batching(options.max_batch, options.max_wait_ms / 1e3)
    work = worker.Worker(policies, reader, batching, seed=options.seed)
    print(f"compiling {', '.join(policies)} for {batching.sizes} clients", flush=True)
    work.start()
    told = about.metadata(options.bundle, policies, reader, batching)
    bounds = server.Limits(
        message=int(options.max_message_mb * 2**20), clients=options.max_clients,
        rate=options.max_rate, drain=options.drain_s,
    )  # fmt: skip
    return server.Application(work, told, bounds, key)


if __name__ == "__main__":
    cli.run(main, define_flags)
