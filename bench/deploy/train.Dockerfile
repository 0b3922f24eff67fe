# Training, rollouts and Ray: docker build -f bench/deploy/train.Dockerfile -t logitcask-train:0.1.0 .
# The version of Python is that of the vLLM image, because the nodes of a Ray cluster must agree.
FROM python:3.12-slim
# Triton compiles kernels at run time; the health checks of KubeRay call wget.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 logitcask
COPY pyproject.toml README.md LICENSE constraints.txt /src/
COPY .src /src/.src
COPY engine /src/engine
COPY kernels /src/kernels
COPY cli /src/cli
RUN pip install --no-cache-dir -c /src/constraints.txt \
        "torch==2.13.0" "ray[default]==2.60.0" "/src[lora,s3,server,data,trackers]"
USER logitcask
WORKDIR /home/logitcask
ENV HF_HOME=/home/logitcask/models NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# No entry point: Ray's cluster launcher starts a shell in the image.
CMD ["logitcask", "train", "--help"]
