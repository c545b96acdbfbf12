# A starting point that nobody has built or run yet.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv git g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/seq1f1b
COPY . .
RUN bash tools/setup_env.sh
ENV PATH=/opt/seq1f1b/.venv/bin:$PATH
CMD ["bash"]
