# The GPU image: CUDA with a compiler (Triton compiles what starts its kernels at first use), the tested package set, no root.
#   docker build -t gpt-oss-cpt .
#   docker run --gpus all --shm-size=16g -v /data:/data gpt-oss-cpt deepspeed cpt/run.py --ds_config ...
# docs/slurm.md describes SLURM: Apptainer or Pyxis run the image as the user of the job, with the repository mounted.
# The digest is that of the index of all architectures.  Another tag:  docker buildx imagetools inspect nvidia/cuda:TAG
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04@sha256:7d2f6a8c2071d911524f95061a0db363e24d27aa51ec831fcccf9e76eb72bc92
FROM ${BASE}

# NCCL opens libibverbs and its providers at run time; the CUDA image has neither, and without them NCCL goes over TCP and
# says nothing.  ibverbs-utils: `ibv_devinfo` in a container shows whether the adapters are seen.
# No versions here: apt checks Ubuntu's signatures, and a build takes the fixes that Ubuntu has published.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev build-essential \
        libibverbs1 ibverbs-providers librdmacm1 ibverbs-utils \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv && useradd --create-home --uid 10001 cpt
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

WORKDIR /opt/gpt-oss-cpt
# every package with its hash, and nothing that is not listed
COPY requirements/build.txt requirements/run.txt requirements/torch-cuda.txt requirements/
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements/build.txt \
    && pip install --no-cache-dir --no-deps --no-build-isolation --use-pep517 --require-hashes \
        -r requirements/torch-cuda.txt -r requirements/run.txt
COPY constraints.txt setup.cfg pyproject.toml README.md LICENSE ./
COPY cpt cpt
COPY data_pipeline data_pipeline
RUN pip install --no-cache-dir --no-deps --no-build-isolation --use-pep517 -e . && pip check
# flash-attn is optional and compiles for half an hour:
#   RUN pip install --no-cache-dir --no-build-isolation --use-pep517 'flash-attn>=2.8.3'
# what `cpt init` copies
COPY configs configs
COPY ds_configs ds_configs
COPY slurm slurm
COPY docs/mix.schema.json docs/run.schema.json docs/

RUN install -d -o cpt -g cpt data runs
USER 10001
CMD ["deepspeed", "cpt/run.py", "--ds_config", "ds_configs/z3_ulysses.json"]
