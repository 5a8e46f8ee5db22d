# The repository with its environment, for a user who is not root. Build it in a clone:
#
#   docker build -t aplsmear .
#   docker run --rm -it aplsmear                                   # make demo
#   docker run --rm -it -v /data/our_smears:/smears:ro aplsmear bash
#
# The image holds what git stores and nothing else: no data of patients (.dockerignore).

# What the operating system needs. The development container uses this stage.
FROM python:3.11-slim-bookworm AS system
# hadolint ignore=DL3008 # Debian deletes old versions, so a pinned one cannot be installed for long
RUN apt-get update \
 && apt-get install -y --no-install-recommends git make \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 aplsmear
USER 1000
WORKDIR /home/aplsmear
RUN git config --global user.name aplsmear && git config --global user.email aplsmear@localhost

# A clone with its environment. pip's copies of the packages stay in this stage.
FROM system AS environment
COPY --chown=1000 .git source/.git
RUN git clone --quiet source repository \
 && git -C repository remote remove origin \
 && make -C repository venv

FROM system
COPY --from=environment --chown=1000 /home/aplsmear/repository repository
WORKDIR /home/aplsmear/repository
ENV PATH=/home/aplsmear/repository/.venv/bin:$PATH
CMD ["make", "demo"]
