//! Names of images: their full form, and which of them this node's base image stands in for.
//!
//! Owns: the table of names. Never asks a registry.

use std::fmt;

/// A name as registries know it: `docker.io/library/debian:12`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reference {
    /// Registry and repository: `docker.io/library/debian`.
    pub repository: String,
    /// `latest` if none was given.
    pub tag: String,
    /// `sha256:…`; such a name means exactly one image and nothing can stand in for it.
    pub digest: Option<String>,
}

impl Reference {
    /// Completes a name the way Docker does. `None` if it is no name of an image.
    pub fn parse(text: &str) -> Option<Self> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-/:@+".contains(c);
        if text.is_empty() || text.len() > 512 || !text.chars().all(allowed) || text.starts_with('-') {
            return None;
        }
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(digest.to_owned())),
            None => (text, None),
        };
        // A colon before the last slash belongs to a port of the registry.
        let (path, tag) = match name.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, tag),
            _ => (name, "latest"),
        };
        if path.is_empty() || tag.is_empty() || path.split('/').any(str::is_empty) {
            return None;
        }
        let (registry, repository) = match path.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest.to_owned()),
            _ => ("docker.io", path.to_owned()),
        };
        let (registry, repository) = match registry {
            "docker.io" | "index.docker.io" if !repository.contains('/') => ("docker.io", format!("library/{repository}")),
            "index.docker.io" => ("docker.io", repository),
            other => (other, repository),
        };
        Some(Self { repository: format!("{registry}/{repository}"), tag: tag.to_owned(), digest })
    }

    /// Whether the node's Debian 12 base stands in for it. The table is this function:
    ///
    /// | name | tags | why |
    /// |---|---|---|
    /// | `public.ecr.aws/lambda/microvms` | all | AWS's base; `dnf` and `microdnf` are there as shims |
    /// | `amazonlinux`, `public.ecr.aws/amazonlinux/…` | all | what AWS's samples begin with; the same shims |
    /// | `debian` | none, `latest`, `stable…`, `bookworm…`, `12…` | it is that |
    /// | `python` | `3…`, `3.11…` as far as they are Debian 12 | it holds Python 3.11 and pip |
    ///
    /// Official images count also by their names on `public.ecr.aws/docker/library`.
    pub fn is_debian_base(&self) -> bool {
        if self.digest.is_some() {
            return false;
        }
        let tag = self.tag.as_str();
        let official = self
            .repository
            .strip_prefix("docker.io/library/")
            .or_else(|| self.repository.strip_prefix("public.ecr.aws/docker/library/"));
        match (official, self.repository.as_str()) {
            (_, "public.ecr.aws/lambda/microvms") | (Some("amazonlinux"), _) => true,
            (_, repository) if repository.starts_with("public.ecr.aws/amazonlinux/") => true,
            (Some("debian"), _) => {
                let release = tag.strip_suffix("-slim").unwrap_or(tag);
                matches!(release, "latest" | "stable" | "bookworm" | "12") || release.starts_with("12.") || release.starts_with("bookworm-")
            }
            (Some("python"), _) => {
                let (version, flavour) = tag.split_once('-').unwrap_or((tag, ""));
                matches!(version, "3" | "3.11") && matches!(flavour, "" | "slim" | "bookworm" | "slim-bookworm")
            }
            _ => false,
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.digest {
            Some(digest) => write!(f, "{}@{digest}", self.repository),
            None => write!(f, "{}:{}", self.repository, self.tag),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(text: &str) -> Option<String> {
        Reference::parse(text).map(|reference| reference.to_string())
    }

    #[test]
    fn names_are_completed_as_docker_does() {
        for (text, expected) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("docker.io/debian:12", "docker.io/library/debian:12"),
            ("index.docker.io/library/debian", "docker.io/library/debian:latest"),
            ("grafana/grafana:9", "docker.io/grafana/grafana:9"),
            ("localhost/x", "localhost/x:latest"),
            ("registry:5000/a/b", "registry:5000/a/b:latest"),
            ("public.ecr.aws/lambda/microvms:al2023-minimal", "public.ecr.aws/lambda/microvms:al2023-minimal"),
            ("debian:12@sha256:ab", "docker.io/library/debian@sha256:ab"),
        ] {
            assert_eq!(full(text).as_deref(), Some(expected), "{text}");
        }
        for bad in ["", "a b", "-v", "a//b", ":tag", "a:", "$X", "a;b", "ä"] {
            assert_eq!(full(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_base_stands_in_for_what_it_really_is() {
        for held in [
            "public.ecr.aws/lambda/microvms:al2023-minimal",
            "public.ecr.aws/lambda/microvms",
            "amazonlinux:2023",
            "public.ecr.aws/amazonlinux/amazonlinux:2023-minimal",
            "debian",
            "debian:bookworm-slim",
            "debian:12.5",
            "debian:bookworm-20250520-slim",
            "public.ecr.aws/docker/library/debian:stable-slim",
            "python:3",
            "python:3.11-slim",
            "python:3.11-slim-bookworm",
        ] {
            assert!(Reference::parse(held).unwrap().is_debian_base(), "{held}");
        }
        for other in [
            "debian:13",
            "debian:trixie",
            "debian:11",
            "python:3.12",
            "python:3.11-alpine",
            "python:2",
            "ubuntu",
            "alpine",
            "node:20",
            "evil/debian:12",
            "ghcr.io/library/debian:12",
            "debian:12@sha256:ab",
        ] {
            assert!(!Reference::parse(other).unwrap().is_debian_base(), "{other}");
        }
    }
}
