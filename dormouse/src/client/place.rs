//! Which node is meant, and with which access key.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail};
use config::Config;
use control_api::AccessKeys;

use crate::{env::NodeFile, node};

/// How to reach a node.
pub struct Place {
    /// `http://host:port` of the control API.
    pub api: String,
    /// The same of S3.
    pub s3: String,
    /// Where the edge listens, if that is known; otherwise the endpoints' names say it.
    pub edge: Option<String>,
    /// Certificates that the edge's chain leads to, PEM; `None`: those that the system trusts.
    pub ca: Option<PathBuf>,
    /// In signatures.
    pub region: String,
    /// Public part of the access key.
    pub key: String,
    /// The other part.
    pub secret: String,
}

/// The node of the data directory that was named, else of the environment, else of `./data`.
pub fn find(config: Option<&Path>, data_dir: Option<&Path>) -> Result<Place> {
    if data_dir.is_none()
        && config.is_none()
        && let Some(place) = of_environment()?
    {
        return Ok(place);
    }
    let named = match data_dir {
        Some(dir) => dir.to_owned(),
        None => Config::load(config)?.node.data_dir,
    };
    of_data_dir(&named)
}

fn of_data_dir(data_dir: &Path) -> Result<Place> {
    let file = NodeFile::read(data_dir).context(format!(
        "there is no node to talk to: neither AWS_ENDPOINT_URL_LAMBDA_MICROVMS is set (see `dormouse env`) nor does {} belong to one",
        data_dir.display()
    ))?;
    let key = AccessKeys::open_or_create(&node::credentials_file(data_dir))?.first();
    let api = format!("http://{}", file.api);
    Ok(Place { s3: api.clone(), api, edge: Some(file.edge), ca: Some(file.ca.into()), region: file.region, key: key.id, secret: key.secret })
}

fn of_environment() -> Result<Option<Place>> {
    let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let Some(api) = variable("AWS_ENDPOINT_URL_LAMBDA_MICROVMS") else { return Ok(None) };
    let needed = |name: &str| variable(name).ok_or_else(|| anyhow!("AWS_ENDPOINT_URL_LAMBDA_MICROVMS is set and {name} is not; run: eval \"$(dormouse env)\""));
    let region = variable("AWS_REGION").or_else(|| variable("AWS_DEFAULT_REGION"));
    let ca = variable("DORMOUSE_CA_BUNDLE").map(PathBuf::from);
    if let Some(path) = &ca
        && let Err(error) = fs::metadata(path)
    {
        bail!("DORMOUSE_CA_BUNDLE names {}, which cannot be used: {error}", path.display());
    }
    Ok(Some(Place {
        s3: variable("AWS_ENDPOINT_URL_S3").unwrap_or_else(|| api.clone()),
        api,
        edge: variable("DORMOUSE_EDGE"),
        ca,
        region: region.map_or_else(|| needed("AWS_REGION"), Ok)?,
        key: needed("AWS_ACCESS_KEY_ID")?,
        secret: needed("AWS_SECRET_ACCESS_KEY")?,
    }))
}
