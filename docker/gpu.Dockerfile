# resnet-jax for NVIDIA GPUs. From the root of the repository:
#   docker build --file docker/gpu.Dockerfile --tag resnet-jax:gpu .
#   docker run --rm --gpus all --init --network host --shm-size 8g \
#       --volume /data:/data --volume /runs:/runs resnet-jax:gpu \
#       train --config imagenet:resnet50 --workdir /runs/r50 \
#       --config.data.path=/data/imagenet
# CUDA comes with jax's wheels; the host needs a driver for CUDA 13 (580 or newer) and the
# NVIDIA Container Toolkit. The user has number 1000, to whom /runs has to be open.
FROM python:3.13.9-slim-trixie

ARG JAX_VERSION=0.10.2

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/resnet_jax
COPY pyproject.toml setup.py README.md LICENSE ./
COPY resnet_jax ./resnet_jax
COPY configs ./configs
RUN pip install ".[cuda13,gcs]" "jax[cuda13]==${JAX_VERSION}"

RUN useradd --create-home --uid 1000 resnet
USER resnet

# Exec form: SIGTERM reaches the run itself.
ENTRYPOINT ["resnet-jax"]
CMD ["--help"]
