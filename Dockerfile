# An image of the packages in requirements.lock and of this code, for CPUs and GPUs: docs/install.md has the commands.
# The packages bring CUDA's libraries with them, so the base image needs none. A GPU host needs NVIDIA's driver (580
# or newer) and the NVIDIA Container Toolkit.
FROM python:3.12-slim-bookworm

# gcc: torch.compile compiles with it. make: runs the commands. procps: `ps`. git: the commit in
# env.json, if the checkout is mounted: the image does not contain `.git`.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev make procps git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.lock .
RUN pip install --no-cache-dir --require-hashes -r requirements.lock

COPY . .
# Containers also run as other users (--user), who have no home folder and no entry in /etc/passwd.
RUN useradd --uid 1000 --create-home hiera && mkdir -p data runs shards \
    && chmod 1777 data runs shards benchmarks/results
ENV PY=python HOME=/tmp USER=hiera PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER hiera
CMD ["make"]
