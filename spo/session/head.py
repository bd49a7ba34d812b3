"""Does a Ray head answer, with this token and this version? Asked before `ray.init`.

`ray.init` retries for 20 seconds and then says "failed to connect" whatever the cause; one call of
the head's own liveness service tells a closed port, a wrong token and another version apart.
"""

from __future__ import annotations

import os

from spo.errors import StageError

_TIMEOUT_S = 10.0


def check_head(address: str) -> str:
    """Ask the head at "host:port" whether it lives; returns its Ray version.

    Raises:
        StageError: nothing answers there, the token is refused, or the version is another one.
    """
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import AuthenticationError

    channel = init_grpc_channel(address)
    try:
        service = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        reply = service.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=_TIMEOUT_S)
    except AuthenticationError as error:
        raise StageError(f"the Ray head at {address} was not asked: {error}") from error
    except grpc.RpcError as error:
        raise StageError(_refusal(address, error)) from error
    finally:
        channel.close()
    if reply.ray_version and reply.ray_version != ray.__version__:
        raise StageError(
            f"the Ray head at {address} runs Ray {reply.ray_version}, this job has "
            f"{ray.__version__}; they must be the same: install ray=={reply.ray_version} here, or "
            "submit the job with `ray job submit`, so that it runs in the cluster's own image"
        )
    version: str = reply.ray_version
    return version


def _refusal(address: str, error: object) -> str:
    import grpc

    assert isinstance(error, grpc.Call)
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        return (
            f"the Ray head at {address} refused the token (RAY_AUTH_MODE is {mode}); set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token "
            "(`ray get-auth-token` on the head prints it)"
        )
    return (
        f"no Ray head answers at {address} ({error.code().name}: {error.details()}); check the "
        "address, that the cluster runs (`ray status` on the head) and that the port is open"
    )
