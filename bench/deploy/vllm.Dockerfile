# Scoring and sampling with vLLM: docker build -f bench/deploy/vllm.Dockerfile -t logitcask-vllm:0.1.0 .
FROM vllm/vllm-openai:v0.32.0
RUN (getent passwd 1000 || useradd --uid 1000 logitcask) && install -d -o 1000 /home/logitcask
COPY pyproject.toml README.md LICENSE constraints-vllm.txt /src/
COPY .src /src/.src
COPY engine /src/engine
COPY kernels /src/kernels
COPY cli /src/cli
# The torch and transformers of vLLM stay: of ours come the packages that need neither.
RUN uv pip install --system --no-cache -c /src/constraints-vllm.txt \
        zarr numcodecs pcodec google-crc32c rich-click "ray[default]==2.60.0" \
        "obstore==0.12.1" "aiohttp==3.14.5" "setuptools>=77" \
    && uv pip install --system --no-cache --no-deps --no-build-isolation /src
USER 1000
WORKDIR /home/logitcask
ENV HOME=/home/logitcask HF_HOME=/home/logitcask/models
# Not vLLM's own entry point, `vllm serve`.
ENTRYPOINT []
CMD ["logitcask", "score", "--help"]
