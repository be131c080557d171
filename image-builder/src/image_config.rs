//! An image's configuration (ENTRYPOINT, CMD, ENV, …) as what the guest agent starts.
//!
//! Owns: the defaults that a container runtime would fill in. Never reads files.

use std::collections::BTreeMap;

use model::{Port, Rights};
use protocol::agent::AppSpec;
use serde::Deserialize;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// `config` of the OCI image specification, as far as it concerns a microVM.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct ImageConfig {
    pub user: String,
    /// Keys are `8080/tcp`.
    pub exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
    pub env: Option<Vec<String>>,
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
    pub working_dir: String,
}

/// Why an image cannot be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("the configuration that buildah shows for the image cannot be read")]
    Inspect(#[source] serde_json::Error),
    #[error("the image says nothing about what to start: the Dockerfile needs a CMD or an ENTRYPOINT")]
    NothingToStart,
}

impl ImageConfig {
    /// Reads the output of `buildah inspect --type image`.
    pub fn from_inspect(json: &[u8]) -> Result<Self, ConfigError> {
        #[derive(Deserialize)]
        struct Inspect {
            #[serde(rename = "OCIv1")]
            oci: Oci,
        }
        #[derive(Deserialize)]
        struct Oci {
            #[serde(default)]
            config: ImageConfig,
        }
        serde_json::from_slice::<Inspect>(json).map(|inspect| inspect.oci.config).map_err(ConfigError::Inspect)
    }
}

/// `passwd`: the image's `/etc/passwd`, for the home of its user. `exposed_order`: ports in the order of the Dockerfile; the
/// configuration itself keeps them unordered.
pub(crate) fn app(config: ImageConfig, passwd: &str, exposed_order: &[u16]) -> Result<AppSpec, ConfigError> {
    let mut argv = config.entrypoint.unwrap_or_default();
    argv.extend(config.cmd.unwrap_or_default());
    if argv.first().is_none_or(|program| program.is_empty()) {
        return Err(ConfigError::NothingToStart);
    }
    let mut env: Vec<(String, String)> = Vec::new();
    for variable in config.env.unwrap_or_default() {
        let (name, value) = variable.split_once('=').unwrap_or((&variable, ""));
        set(&mut env, name, value);
    }
    if !env.iter().any(|(name, _)| name == "PATH") {
        set(&mut env, "PATH", DEFAULT_PATH);
    }
    if !env.iter().any(|(name, _)| name == "HOME") {
        set(&mut env, "HOME", &home(&config.user, passwd));
    }
    let mut exposed: Vec<Port> = config.exposed_ports.unwrap_or_default().keys().filter_map(|key| tcp_port(key)).collect();
    exposed.sort_by_key(|port| (exposed_order.iter().position(|other| *other == port.get()).unwrap_or(usize::MAX), *port));
    let workdir = if config.working_dir.is_empty() { "/".to_owned() } else { config.working_dir };
    Ok(AppSpec { argv, env, workdir, user: config.user, exposed, rights: Rights::default() })
}

/// Sets a variable in place, or adds it; an empty name is not one.
pub(crate) fn set(env: &mut Vec<(String, String)>, name: &str, value: &str) {
    match env.iter_mut().find(|(other, _)| other == name) {
        Some((_, old)) => value.clone_into(old),
        None if name.is_empty() => {}
        None => env.push((name.to_owned(), value.to_owned())),
    }
}

fn tcp_port(key: &str) -> Option<Port> {
    let (number, protocol) = key.split_once('/').unwrap_or((key, "tcp"));
    number.parse().ok().filter(|_| protocol == "tcp")
}

/// As container runtimes do it: from passwd, else `/`.
fn home(user: &str, passwd: &str) -> String {
    let user = user.split(':').next().unwrap_or_default();
    let user = if user.is_empty() { "root" } else { user };
    let found = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, uid, home) = (fields.next()?, fields.nth(1)?, fields.nth(2)?);
        ((name == user || uid == user) && home.starts_with('/')).then(|| home.to_owned())
    });
    let otherwise = if matches!(user, "root" | "0") { "/root" } else { "/" };
    found.unwrap_or_else(|| otherwise.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nweb:x:1000:1000::/home/web:/bin/sh\nodd:x:5\n";

    fn mapped(config: &str) -> Result<AppSpec, ConfigError> {
        let json = format!("{{\"OCIv1\": {{\"config\": {config}}}}}");
        app(ImageConfig::from_inspect(json.as_bytes()).unwrap(), PASSWD, &[9000, 8080])
    }

    #[test]
    fn entrypoint_comes_before_cmd_and_defaults_are_filled_in() {
        let app = mapped(r#"{"Entrypoint": ["/run"], "Cmd": ["a", "b"]}"#).unwrap();
        assert_eq!(app.argv, ["/run", "a", "b"]);
        assert_eq!(app.env, [("PATH".to_owned(), DEFAULT_PATH.to_owned()), ("HOME".to_owned(), "/root".to_owned())]);
        assert_eq!((app.workdir.as_str(), app.user.as_str(), app.exposed.len()), ("/", "", 0));
    }

    #[test]
    fn everything_is_taken_over() {
        let app = mapped(
            r#"{"User": "web:web", "WorkingDir": "/srv", "Cmd": ["x"], "Env": ["PATH=/bin", "A=1=2", "B=", "A=3"],
                "ExposedPorts": {"53/udp": {}, "80/tcp": {}, "8080/tcp": {}, "9000/tcp": {}, "0/tcp": {}, "7": {}}}"#,
        )
        .unwrap();
        let env: Vec<(&str, &str)> = app.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(env, [("PATH", "/bin"), ("A", "3"), ("B", ""), ("HOME", "/home/web")]);
        assert_eq!(app.exposed.iter().map(|port| port.get()).collect::<Vec<_>>(), [9000, 8080, 7, 80], "the Dockerfile's order, then by number");
        assert_eq!((app.workdir.as_str(), app.user.as_str()), ("/srv", "web:web"));
    }

    #[test]
    fn homes_are_found_by_name_and_by_number() {
        for (user, expected) in [("", "/root"), ("0:0", "/root"), ("1000", "/home/web"), ("web", "/home/web"), ("4711", "/"), ("odd", "/")] {
            assert_eq!(home(user, PASSWD), expected, "{user}");
        }
        assert_eq!(home("0", ""), "/root");
    }

    #[test]
    fn an_image_without_a_command_is_refused() {
        for config in ["{}", r#"{"Cmd": []}"#, r#"{"Cmd": null, "Entrypoint": null}"#, r#"{"Cmd": [""]}"#] {
            assert!(matches!(mapped(config), Err(ConfigError::NothingToStart)), "{config}");
        }
        assert!(matches!(ImageConfig::from_inspect(b"{}"), Err(ConfigError::Inspect(_))));
    }
}
