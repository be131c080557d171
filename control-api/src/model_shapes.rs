//! The inputs of the operations, as constraints: a transcript of AWS's model of API version 2025-09-09.
//!
//! Path labels and query parameters are members like those of the body, as in the model.

use crate::shape::{Member, Pattern, Shape, optional, required};

const ANY: i64 = i32::MAX as i64;
const UNBOUNDED: usize = usize::MAX;

const fn text(min: usize, max: usize) -> Shape {
    Shape::Text { min, max, pattern: None, secret: false }
}

const fn matching(min: usize, max: usize, text: &'static str, fits: fn(&str) -> bool) -> Shape {
    Shape::Text { min, max, pattern: Some(Pattern { text, fits }), secret: false }
}

fn no_blanks(text: &str) -> bool {
    !text.is_empty() && !text.contains(char::is_whitespace)
}

fn image_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

/// `arn:aws[a-z\-]*:iam::[0-9]{12}:role/?[a-zA-Z_0-9+=,.@\-_/]+`
fn role_arn(text: &str) -> bool {
    let Some((partition, rest)) = text.strip_prefix("arn:aws").and_then(|rest| rest.split_once(":iam::")) else { return false };
    let Some((account, role)) = rest.split_once(':') else { return false };
    let Some(name) = role.strip_prefix("role") else { return false };
    partition.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-')
        && twelve_digits(account)
        && !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_+=,.@-/".contains(&byte))
}

/// `(arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:(key|alias)/[a-zA-Z0-9:/_-]+|alias/[a-zA-Z0-9:/_-]+|[a-zA-Z0-9-]+)`
fn kms_key(text: &str) -> bool {
    let plain = |text: &str, more: &[u8]| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || more.contains(&byte));
    let names_key = |rest: &str| ["key/", "alias/"].iter().any(|kind| rest.strip_prefix(kind).is_some_and(|name| plain(name, b":/_-")));
    match text.splitn(6, ':').collect::<Vec<_>>()[..] {
        ["arn", partition, "kms", region, account, rest] => {
            let dialect = partition.strip_prefix("aws");
            dialect.is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'))
                && !region.is_empty()
                && region.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
                && twelve_digits(account)
                && names_key(rest)
        }
        _ => text.strip_prefix("alias/").map_or_else(|| plain(text, b"-"), |name| plain(name, b":/_-")),
    }
}

fn twelve_digits(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The ARNs of Lambda that can have tags: those of functions, layers and others too, which this node does not have.
fn taggable(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    let ["arn", partition, "lambda", region, account, kind, name, ref qualifier @ ..] = parts[..] else { return false };
    let plain = |text: &str| image_name(text);
    let fits = match (kind, qualifier) {
        ("function", [] | ["$LATEST"]) | ("layer" | "capacity-provider" | "network-connector" | "microvm-image", []) => plain(name),
        ("function", [version]) => plain(name) && plain(version),
        ("code-signing-config", []) => name.strip_prefix("csc-").is_some_and(|rest| {
            rest.len() == 17 && rest.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        }),
        ("event-source-mapping", []) => name.len() == 36 && uuid::Uuid::try_parse(name).is_ok(),
        _ => false,
    };
    let dialect = partition.strip_prefix("aws");
    fits && twelve_digits(account) && region_name(region) && dialect.is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'-'))
}

/// `(eusc-)?[a-z]{2}((-gov)|(-iso([a-z]?)))?-[a-z]+-\d{1}`
fn region_name(text: &str) -> bool {
    let letters = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_lowercase());
    let parts: Vec<&str> = text.strip_prefix("eusc-").unwrap_or(text).split('-').collect();
    let (country, part, rest) = match parts[..] {
        [country, place, number] => (country, None, (place, number)),
        [country, part, place, number] => (country, Some(part), (place, number)),
        _ => return false,
    };
    let known_part = part.is_none_or(|part| part == "gov" || part.strip_prefix("iso").is_some_and(|rest| rest.len() <= 1 && (rest.is_empty() || letters(rest))));
    country.len() == 2 && letters(country) && known_part && letters(rest.0) && rest.1.len() == 1 && rest.1.bytes().all(|byte| byte.is_ascii_digit())
}

/// Letters, blanks and digits of every script are in the classes L, Z and N of the model.
fn tag(text: &str) -> bool {
    text.chars().all(|c| c.is_alphanumeric() || (c.is_whitespace() && !c.is_control()) || "_.:/=+-@".contains(c))
}

fn log_group(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-/.#".contains(&byte))
}

fn log_stream(text: &str) -> bool {
    !text.contains([':', '*'])
}

static FREE_TEXT: Shape = text(0, UNBOUNDED);
static NON_BLANK: Shape = matching(1, 2048, r"[^\s]+", no_blanks);
static VERSION: Shape = matching(1, 2048, r"[^\s]+", no_blanks);
static ROLE_ARN: Shape = matching(20, 2048, r"arn:aws[a-z\-]*:iam::[0-9]{12}:role/?[a-zA-Z_0-9+=,.@\-_/]+", role_arn);
static IDENTIFIER: Shape = text(1, 256);
static CLIENT_TOKEN: Shape = text(1, 128);
static IMAGE_NAME: Shape = matching(1, 64, "[a-zA-Z0-9-_]+", image_name);
static CONNECTOR: Shape = text(1, 2048);
static CONNECTORS: Shape = Shape::List { of: &CONNECTOR, min: 0, max: 10 };
static ONE_CONNECTOR: Shape = Shape::List { of: &CONNECTOR, min: 0, max: 1 };
static POSITIVE: Shape = Shape::Integer { min: 1, max: ANY };
static PORT: Shape = Shape::Integer { min: 1, max: 65_535 };
static PAGE_SIZE: Shape = Shape::Integer { min: 1, max: 50 };
static BOOLEAN: Shape = Shape::Boolean;
static UNIT: Shape = Shape::Structure(&[]);

static CLOUD_WATCH: Shape = Shape::Structure(&[
    optional("logGroup", &matching(1, 512, r"[a-zA-Z0-9_\-/.#]+", log_group)),
    optional("logStream", &matching(1, 512, "[^:*]*", log_stream)),
]);
static LOGGING: Shape = Shape::Union(&[optional("disabled", &UNIT), optional("cloudWatch", &CLOUD_WATCH)]);

static IDLE_POLICY: Shape = Shape::Structure(&[
    required("maxIdleDurationSeconds", &Shape::Integer { min: 1, max: ANY }),
    required("suspendedDurationSeconds", &Shape::Integer { min: 0, max: ANY }),
    required("autoResumeEnabled", &BOOLEAN),
]);

static PORT_SPECIFICATION: Shape = Shape::Union(&[
    optional("port", &PORT),
    optional("range", &Shape::Structure(&[required("startPort", &PORT), required("endPort", &PORT)])),
    optional("allPorts", &UNIT),
]);

static HOOK_STATE: Shape = Shape::Enum(&["DISABLED", "ENABLED"]);
static SHORT_TIMEOUT: Shape = Shape::Integer { min: 1, max: 60 };
static LONG_TIMEOUT: Shape = Shape::Integer { min: 1, max: 3600 };
static HOOKS: Shape = Shape::Structure(&[
    optional("port", &PORT),
    optional(
        "microvmHooks",
        &Shape::Structure(&[
            optional("run", &HOOK_STATE),
            optional("runTimeoutInSeconds", &SHORT_TIMEOUT),
            optional("resume", &HOOK_STATE),
            optional("resumeTimeoutInSeconds", &SHORT_TIMEOUT),
            optional("suspend", &HOOK_STATE),
            optional("suspendTimeoutInSeconds", &SHORT_TIMEOUT),
            optional("terminate", &HOOK_STATE),
            optional("terminateTimeoutInSeconds", &SHORT_TIMEOUT),
        ]),
    ),
    optional(
        "microvmImageHooks",
        &Shape::Structure(&[
            optional("ready", &HOOK_STATE),
            optional("readyTimeoutInSeconds", &LONG_TIMEOUT),
            optional("validate", &HOOK_STATE),
            optional("validateTimeoutInSeconds", &LONG_TIMEOUT),
        ]),
    ),
]);

static ARCHITECTURE: Shape = Shape::Enum(&["ARM_64", "X86_64"]);
static CPU_CONFIGURATIONS: Shape =
    Shape::List { of: &Shape::Structure(&[required("architecture", &ARCHITECTURE)]), min: 0, max: UNBOUNDED };
static RESOURCES: Shape =
    Shape::List { of: &Shape::Structure(&[required("minimumMemoryInMiB", &Shape::Integer { min: -ANY, max: ANY })]), min: 0, max: 1 };
static CAPABILITIES: Shape = Shape::List { of: &Shape::Enum(&["ALL"]), min: 0, max: UNBOUNDED };
static ENVIRONMENT: Shape = Shape::Map {
    key: &matching(1, 256, r"[^\s]+", no_blanks),
    value: &Shape::Text { min: 0, max: 4096, pattern: None, secret: true },
    max: 100,
};
static KMS_KEY: Shape = matching(
    1,
    2048,
    "(arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:(key|alias)/[a-zA-Z0-9:/_-]+|alias/[a-zA-Z0-9:/_-]+|[a-zA-Z0-9-]+)",
    kms_key,
);
static TAG_KEY: Shape = matching(1, 128, r"([\p{L}\p{Z}\p{N}_.:/=+\-@]*)", tag);
static TAGS: Shape = Shape::Map {
    key: &TAG_KEY,
    value: &matching(0, 256, r"([\p{L}\p{Z}\p{N}_.:/=+\-@]*)", tag),
    max: UNBOUNDED,
};

const MICROVM: Member = required("microvmIdentifier", &IDENTIFIER);
const IMAGE: Member = required("imageIdentifier", &IDENTIFIER);
const MAX_RESULTS: Member = optional("maxResults", &PAGE_SIZE);
const NEXT_TOKEN: Member = optional("nextToken", &FREE_TEXT);

/// GetMicrovm, SuspendMicrovm, ResumeMicrovm, TerminateMicrovm.
pub(crate) static MICROVM_INPUT: Shape = Shape::Structure(&[MICROVM]);

pub(crate) static LIST_MICROVMS: Shape =
    Shape::Structure(&[MAX_RESULTS, NEXT_TOKEN, optional("imageIdentifier", &IDENTIFIER), optional("imageVersion", &FREE_TEXT)]);

pub(crate) static RUN_MICROVM: Shape = Shape::Structure(&[
    optional("ingressNetworkConnectors", &CONNECTORS),
    optional("egressNetworkConnectors", &CONNECTORS),
    IMAGE,
    optional("imageVersion", &VERSION),
    optional("executionRoleArn", &ROLE_ARN),
    optional("idlePolicy", &IDLE_POLICY),
    optional("logging", &LOGGING),
    optional("kmsKeyIdentifier", &KMS_KEY),
    optional("runHookPayload", &Shape::Payload { max_bytes: 4096 }),
    optional("maximumDurationInSeconds", &Shape::Integer { min: 1, max: 28_800 }),
    optional("clientToken", &CLIENT_TOKEN),
]);

pub(crate) static CREATE_AUTH_TOKEN: Shape = Shape::Structure(&[
    MICROVM,
    required("expirationInMinutes", &POSITIVE),
    required("allowedPorts", &Shape::List { of: &PORT_SPECIFICATION, min: 1, max: UNBOUNDED }),
]);

pub(crate) static CREATE_SHELL_AUTH_TOKEN: Shape = Shape::Structure(&[MICROVM, required("expirationInMinutes", &POSITIVE)]);

/// What an update of an image says as its creation does, and then what only one of them says.
macro_rules! image_with {
    ($($own:expr),+) => {
        Shape::Structure(&[
            required("baseImageArn", &NON_BLANK),
            optional("baseImageVersion", &VERSION),
            required("buildRoleArn", &ROLE_ARN),
            optional("description", &FREE_TEXT),
            required("codeArtifact", &Shape::Union(&[optional("uri", &NON_BLANK)])),
            optional("logging", &LOGGING),
            optional("egressNetworkConnectors", &ONE_CONNECTOR),
            optional("cpuConfigurations", &CPU_CONFIGURATIONS),
            optional("resources", &RESOURCES),
            optional("additionalOsCapabilities", &CAPABILITIES),
            optional("hooks", &HOOKS),
            optional("environmentVariables", &ENVIRONMENT),
            optional("kmsKeyIdentifier", &KMS_KEY),
            $($own),+
        ])
    };
}

pub(crate) static CREATE_IMAGE: Shape = image_with![required("name", &IMAGE_NAME), optional("tags", &TAGS), optional("clientToken", &CLIENT_TOKEN)];

pub(crate) static UPDATE_IMAGE: Shape = image_with![IMAGE, optional("clientToken", &CLIENT_TOKEN)];

pub(crate) static IMAGE_INPUT: Shape = Shape::Structure(&[IMAGE]);

pub(crate) static LIST_IMAGES: Shape = Shape::Structure(&[MAX_RESULTS, NEXT_TOKEN, optional("nameFilter", &NON_BLANK)]);

/// ListMicrovmImageVersions, ListManagedMicrovmImageVersions.
pub(crate) static LIST_OF_IMAGE: Shape = Shape::Structure(&[MAX_RESULTS, NEXT_TOKEN, IMAGE]);

pub(crate) static LIST_MANAGED_IMAGES: Shape = Shape::Structure(&[MAX_RESULTS, NEXT_TOKEN]);

pub(crate) static IMAGE_VERSION_INPUT: Shape = Shape::Structure(&[IMAGE, required("imageVersion", &NON_BLANK)]);

pub(crate) static UPDATE_IMAGE_VERSION: Shape =
    Shape::Structure(&[IMAGE, required("imageVersion", &NON_BLANK), required("status", &Shape::Enum(&["ACTIVE", "INACTIVE"]))]);

pub(crate) static LIST_BUILDS: Shape = Shape::Structure(&[
    MAX_RESULTS,
    NEXT_TOKEN,
    IMAGE,
    required("imageVersion", &NON_BLANK),
    optional("architecture", &ARCHITECTURE),
    optional("chipset", &Shape::Enum(&["GRAVITON", "INTEL"])),
    optional("chipsetGeneration", &NON_BLANK),
]);

pub(crate) static GET_BUILD: Shape =
    Shape::Structure(&[IMAGE, required("imageVersion", &NON_BLANK), required("buildId", &NON_BLANK)]);

static TAGGABLE: Shape = matching(
    1,
    10_000,
    r"arn:(aws[a-zA-Z-]*):lambda:(eusc-)?[a-z]{2}((-gov)|(-iso([a-z]?)))?-[a-z]+-\d{1}:\d{12}:(function:[a-zA-Z0-9-_]+(:(\$LATEST|[a-zA-Z0-9-_]+))?|layer:([a-zA-Z0-9-_]+)|code-signing-config:csc-[a-z0-9]{17}|event-source-mapping:[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}|(capacity-provider|network-connector|microvm-image):[a-zA-Z0-9-_]+)",
    taggable,
);
const RESOURCE: Member = required("Resource", &TAGGABLE);

pub(crate) static LIST_TAGS: Shape = Shape::Structure(&[RESOURCE]);

pub(crate) static TAG_RESOURCE: Shape = Shape::Structure(&[RESOURCE, required("Tags", &TAGS)]);

pub(crate) static UNTAG_RESOURCE: Shape =
    Shape::Structure(&[RESOURCE, required("TagKeys", &Shape::List { of: &TAG_KEY, min: 0, max: UNBOUNDED })]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_out_here_means_what_the_model_means() {
        let image = "arn:aws:lambda:us-east-1:000000000000:microvm-image:hello";
        for (fits, good, bad) in [
            (
                taggable as fn(&str) -> bool,
                &[
                    image,
                    "arn:aws-us-gov:lambda:us-gov-west-1:123456789012:microvm-image:a-b_C",
                    "arn:aws-iso-b:lambda:us-isob-east-1:123456789012:layer:a",
                    "arn:aws-eusc:lambda:eusc-de-east-1:123456789012:function:f:$LATEST",
                    "arn:aws:lambda:us-east-1:123456789012:function:f:7",
                    "arn:aws:lambda:us-east-1:123456789012:code-signing-config:csc-0123456789abcdefg",
                    "arn:aws:lambda:us-east-1:123456789012:event-source-mapping:01234567-89ab-cdef-0123-456789ABCDEF",
                ][..],
                &[
                    "",
                    "hello",
                    "arn:aws:lambda:us-east-1:000000000000:microvm:microvm-0",
                    "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1",
                    "arn:aws:lambda:us-east-1:000000000000:microvm-image:",
                    "arn:aws:lambda:us-east-1:000000000000:microvm-image:a:1.0",
                    "arn:aws:lambda:us-east-1:000000000000:microvm-image/a",
                    "arn:aws:lambda:us-east-12:000000000000:microvm-image:a",
                    "arn:aws:lambda:us-isobb-east-1:000000000000:microvm-image:a",
                    "arn:aws:lambda:us-1:000000000000:microvm-image:a",
                    "arn:aws1:lambda:us-east-1:000000000000:microvm-image:a",
                    "arn:aws:s3:us-east-1:000000000000:microvm-image:a",
                    "arn:aws:lambda:us-east-1:123456789012:event-source-mapping:0123456789abcdef0123456789ABCDEF0000",
                ][..],
            ),
            (
                kms_key,
                &["arn:aws:kms:us-east-1:123456789012:key/a-b", "arn:aws-cn:kms:x:123456789012:alias/a:b/_", "alias/a/b", "1234-abcd"],
                &["", "alias/", "a b", "a/b", "a_b", "arn:aws:kms:us-east-1:12345678901:key/a", "arn:aws:kms::123456789012:key/a", "arn:aws:kms:x:123456789012:key/", "arn:aws:kms:x:123456789012:grant/a"],
            ),
            (
                role_arn,
                &["arn:aws:iam::123456789012:role/r", "arn:aws-us-gov:iam::123456789012:role/a/b+=,.@-_"],
                &["arn:aws:iam::12345678901:role/r", "arn:aws:iam::123456789012:user/r", "arn:aws:iam::123456789012:role", "arn:AWS:iam::123456789012:role/r"],
            ),
        ] {
            for text in good {
                assert!(fits(text), "{text}");
            }
            for text in bad {
                assert!(!fits(text), "{text}");
            }
        }
    }
}
