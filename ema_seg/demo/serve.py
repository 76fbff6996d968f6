"""Server of the demo: from models to a page at an address of this machine."""

import os
import socket
import threading
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from tempfile import TemporaryDirectory

from ema_seg.demo.examples import Example
from ema_seg.demo.models import Model
from ema_seg.runtime.errors import ConfigError
from ema_seg.runtime.extras import install_command

__all__ = ["check_port", "require_gradio", "serve"]

_HOST = "127.0.0.1"


def require_gradio() -> None:
    """Import Gradio, with its telemetry switched off.

    Raises:
        ConfigError: Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ema-seg demo needs Gradio ({error}); install it with {install_command('demo')}.") from error


def check_port(port: int | None) -> None:
    """Check that a server can use a port.

    Raises:
        ConfigError: the port is taken, or needs other rights.
    """
    if port is None:
        return
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((_HOST, port))
        except OSError as error:
            raise ConfigError(
                f"port={port}: {error.strerror}; choose another port, or port=null for a free one."
            ) from error


def serve(
    models: Sequence[Model], examples: Sequence[Example], *, port: int | None = None, share: bool = False
) -> None:
    """Show the page on this machine until Ctrl-C.

    Args:
        models: one model, or two that are compared.
        examples: pictures that the page offers.
        port: port of 127.0.0.1; None for a free one.
        share: also give the page a public address, through a tunnel of Gradio's makers.

    Raises:
        ConfigError: Gradio is not installed, the port is taken, or there is no tunnel.
    """
    require_gradio()
    from ema_seg.demo.page import build_page, start_page

    check_port(port)
    for model in models:
        model.warm_up()
    # Gradio checks its own server with a request, which must not go through a proxy.
    os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), _HOST]))
    with TemporaryDirectory(prefix="ema-seg-demo-", dir=os.environ.get("GRADIO_TEMP_DIR")) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # dropped pictures and results do not outlive the demo
        page = build_page(models, examples)
        try:
            with redirect_stdout(StringIO()):  # several lines about tunnels
                start_page(page, _HOST, port, share)
            if share and page.share_url is None:
                raise ConfigError(
                    "share=true: the tunnel cannot be opened; check the network, or leave share=true out."
                )
            print(f"{page.share_url or page.local_url}  (Ctrl-C ends the demo)", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            page.close(verbose=False)
