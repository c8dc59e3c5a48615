# resnet-jax for Cloud TPUs. From the root of the repository:
#   docker build --platform linux/amd64 --file docker/tpu.Dockerfile --tag resnet-jax:tpu .
# For GKE, tag and push it to a registry and see docs/launch.md. On a TPU VM:
#   docker run --rm --privileged --init --network host --shm-size 8g resnet-jax:tpu \
#       train --config imagenet:resnet50 --workdir gs://bucket/r50 --distributed
# TPU devices belong to root, so that this image stays root.
FROM python:3.13.9-slim-trixie

ARG JAX_VERSION=0.10.2

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/resnet_jax
COPY pyproject.toml setup.py README.md LICENSE ./
COPY resnet_jax ./resnet_jax
COPY configs ./configs
RUN pip install ".[tpu,gcs]" "jax[tpu]==${JAX_VERSION}"

# Exec form: SIGTERM reaches the run itself.
ENTRYPOINT ["resnet-jax"]
CMD ["--help"]
