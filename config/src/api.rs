//! `[api]`: who may call the control API, and how often.

use std::net::SocketAddr;

use model::ImageName;
use toml::Value;

use crate::reader::Section;

/// The control API and the S3 endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Api {
    /// Plain HTTP listener.
    pub listen: SocketAddr,
    /// Whether `file://` artifacts of this host are taken.
    pub allow_file_artifacts: bool,
    /// What access keys may do. May be replaced while the node runs.
    pub keys: Vec<ApiKey>,
    /// How often one access key may call.
    pub rates: ApiRates,
}

/// What one access key of the credentials file may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// The access key id.
    pub id: String,
    /// Its role.
    pub role: KeyRole,
}

/// What an access key may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyRole {
    /// Everything.
    Admin,
    /// Everything but making, changing and deleting images and their tags.
    Operator,
    /// Mint tokens for the microVMs of these images, and look at them.
    TokenMinter {
        /// Not empty.
        images: Vec<ImageName>,
    },
}

/// Calls a second of one access key, by operation; `None`: any number. A second's worth may come at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApiRates {
    /// RunMicrovm.
    pub run: Option<u32>,
    /// SuspendMicrovm.
    pub suspend: Option<u32>,
    /// ResumeMicrovm.
    pub resume: Option<u32>,
    /// TerminateMicrovm.
    pub terminate: Option<u32>,
    /// GetMicrovm.
    pub get_microvm: Option<u32>,
    /// ListMicrovms.
    pub list_microvms: Option<u32>,
    /// CreateMicrovmAuthToken.
    pub auth_token: Option<u32>,
    /// CreateMicrovmShellAuthToken.
    pub shell_auth_token: Option<u32>,
    /// CreateMicrovmImage, UpdateMicrovmImage, UpdateMicrovmImageVersion and the two deletes, together.
    pub image_changes: Option<u32>,
    /// All others together.
    pub others: Option<u32>,
}

pub(crate) fn read(s: &mut Section<'_>, listen: SocketAddr) -> Api {
    let listen = s.address("listen", listen, "Control API and S3 endpoint (plain HTTP; keep it on a trusted network).");
    let allow_file_artifacts = s.switch("allow_file_artifacts", true, "Whether an image may be built from a file:// path of this host (never one in the data directory).");
    let keys = keys(s);
    let rates = s.section("rates", |s| {
        let mut rate = |key, default, about| s.optional_count(key, default, 0..=1_000_000, about).map(|rate| rate as u32);
        ApiRates {
            run: rate("run_per_second", 50, "RunMicrovm calls a second of one access key; a second's worth may come at once, more are told 429 with Retry-After. 0: any. Ten times AWS's 5, as a launch takes this node milliseconds; the same for the others below."),
            suspend: rate("suspend_per_second", 50, "SuspendMicrovm (AWS: 2)."),
            resume: rate("resume_per_second", 50, "ResumeMicrovm (AWS: 5)."),
            terminate: rate("terminate_per_second", 100, "TerminateMicrovm (AWS: 10)."),
            get_microvm: rate("get_microvm_per_second", 1_000, "GetMicrovm (AWS: 100)."),
            list_microvms: rate("list_microvms_per_second", 100, "ListMicrovms, which looks at every microVM (AWS's is not published)."),
            auth_token: rate("auth_token_per_second", 500, "CreateMicrovmAuthToken (AWS: 50)."),
            shell_auth_token: rate("shell_auth_token_per_second", 50, "CreateMicrovmShellAuthToken (AWS: 5)."),
            image_changes: rate("image_changes_per_second", 20, "CreateMicrovmImage, UpdateMicrovmImage, UpdateMicrovmImageVersion and the two deletes, together. Each writes to the disk, and a build takes a minute."),
            others: rate("others_per_second", 200, "All other operations together."),
        }
    });
    Api { listen, allow_file_artifacts, keys, rates }
}

fn keys(s: &mut Section<'_>) -> Vec<ApiKey> {
    let about = "What access keys may do; the keys themselves are in <data_dir>/credentials, one profile each. The key of profile default \
                 (or the first one) is admin if it stands nowhere here; any other may do nothing until it does. admin: everything. \
                 operator: everything but making, changing and deleting images and tags. token-minter: mint tokens for the microVMs of its images, get and list those. \
                 Read again while the node runs.";
    let shown = ["id = \"AKIA...\"", "role = \"token-minter\"", "images = [\"hello\"]"];
    let keys = s.sections("keys", about, &shown, |s| {
        let id = s.required("id", "an access key id", |value| value.as_str().filter(|id| !id.is_empty()).map(str::to_owned));
        let role = s.required("role", "\"admin\" or \"operator\" or \"token-minter\"", |value| {
            value.as_str().filter(|role| ["admin", "operator", "token-minter"].contains(role)).map(str::to_owned)
        });
        let images = s.maybe("images", "a list of one or more image names", images);
        let role = match (role.as_deref()?, images?) {
            ("token-minter", Some(images)) => KeyRole::TokenMinter { images },
            ("token-minter", None) => {
                s.refuse("images", "is missing; it must be a list of one or more image names");
                return None;
            }
            (_, Some(_)) => {
                s.refuse("images", "is of no use here: only the role \"token-minter\" is limited to images");
                return None;
            }
            ("admin", None) => KeyRole::Admin,
            (_, None) => KeyRole::Operator,
        };
        Some(ApiKey { id: id?, role })
    });
    if let Some((_, twice)) = (1..).zip(&keys).find(|(number, key)| keys.iter().take(number - 1).any(|before| before.id == key.id)) {
        s.refuse("keys", &format!("name the access key {} twice", twice.id));
    }
    keys
}

fn images(value: &Value) -> Option<Vec<ImageName>> {
    let names = value.as_array().filter(|names| !names.is_empty())?;
    names.iter().map(|name| name.as_str()?.parse().ok()).collect()
}
