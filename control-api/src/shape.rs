//! Checks JSON against shapes of the AWS model.
//!
//! Owns: the kinds of constraints the model knows and AWS's words for each (aws-behaviour §7.3). Wrong JSON types end
//! the check at once; everything else is collected, so that a caller reads all violations together. What the model does
//! not name is ignored, and null is the same as absent.

use serde_json::Value;

use crate::reply::{ApiError, ErrorKind};

/// What the model says a value must be.
pub(crate) enum Shape {
    /// Lengths are in characters.
    Text { min: usize, max: usize, pattern: Option<Pattern>, secret: bool },
    /// A text that is never shown, of at most so many bytes of UTF-8 (aws-behaviour §4).
    Payload { max_bytes: usize },
    Enum(&'static [&'static str]),
    Integer { min: i64, max: i64 },
    Boolean,
    List { of: &'static Shape, min: usize, max: usize },
    Map { key: &'static Shape, value: &'static Shape, max: usize },
    Structure(&'static [Member]),
    /// Exactly one member is set.
    Union(&'static [Member]),
}

/// A regular expression of the model and the same in code.
pub(crate) struct Pattern {
    pub(crate) text: &'static str,
    pub(crate) fits: fn(&str) -> bool,
}

/// A member of a structure or union.
pub(crate) struct Member {
    pub(crate) name: &'static str,
    pub(crate) required: bool,
    pub(crate) shape: &'static Shape,
}

/// A member that may be left out.
pub(crate) const fn optional(name: &'static str, shape: &'static Shape) -> Member {
    Member { name, required: false, shape }
}

/// A member that must be there.
pub(crate) const fn required(name: &'static str, shape: &'static Shape) -> Member {
    Member { name, required: true, shape }
}

/// At most this many characters of a value are repeated in a message.
const SHOWN_CHARS: usize = 256;
/// At most this many violations are told; the count is of all.
const TOLD_VIOLATIONS: usize = 50;

/// Checks an operation's whole input. `least` names integers whose least value is this node's to decide.
pub(crate) fn check(shape: &Shape, input: &Value, least: &[(&str, i64)]) -> Result<(), ApiError> {
    let mut checker = Checker { violations: Vec::new(), total: 0, least };
    checker.value(shape, input, "")?;
    if checker.total == 0 {
        return Ok(());
    }
    let errors = if checker.total == 1 { "error" } else { "errors" };
    Err(ApiError::validation(format!("{} validation {errors} detected: {}", checker.total, checker.violations.join("; "))))
}

struct Checker<'a> {
    violations: Vec<String>,
    total: usize,
    least: &'a [(&'a str, i64)],
}

impl Checker<'_> {
    fn violated(&mut self, shown: &str, path: &str, rule: &str) {
        self.total += 1;
        if self.violations.len() < TOLD_VIOLATIONS {
            self.violations.push(format!("Value{shown} at '{path}' failed to satisfy constraint: Member must {rule}"));
        }
    }

    fn value(&mut self, shape: &Shape, value: &Value, path: &str) -> Result<(), ApiError> {
        match shape {
            Shape::Text { min, max, pattern, secret } => {
                let text = value.as_str().ok_or_else(|| mistyped(value, "a String"))?;
                let shown = if *secret { String::new() } else { shown(text) };
                self.length(text.chars().count(), *min, *max, &shown, path);
                if let Some(pattern) = pattern.as_ref().filter(|pattern| !(pattern.fits)(text)) {
                    self.violated(&shown, path, &format!("satisfy regular expression pattern: {}", pattern.text));
                }
            }
            Shape::Payload { max_bytes } => {
                let text = value.as_str().ok_or_else(|| mistyped(value, "a String"))?;
                self.length(text.len(), 0, *max_bytes, "", path);
            }
            Shape::Enum(names) => {
                let text = value.as_str().ok_or_else(|| mistyped(value, "a String"))?;
                if !names.contains(&text) {
                    self.violated(&shown(text), path, &format!("satisfy enum value set: [{}]", names.join(", ")));
                }
            }
            Shape::Integer { min, max } => {
                let number = value.as_i64().ok_or_else(|| mistyped(value, "an Integer"))?;
                let min = self.least.iter().find(|(of, _)| *of == path).map_or(*min, |(_, least)| *least);
                if number < min {
                    self.violated(&shown(&number.to_string()), path, &format!("have value greater than or equal to {min}"));
                } else if number > *max {
                    self.violated(&shown(&number.to_string()), path, &format!("have value less than or equal to {max}"));
                }
            }
            Shape::Boolean => {
                value.as_bool().ok_or_else(|| mistyped(value, "a Boolean"))?;
            }
            Shape::List { of, min, max } => {
                let items = value.as_array().ok_or_else(|| serialization("Expected list or null"))?;
                self.length(items.len(), *min, *max, &shown(if items.is_empty() { "[]" } else { "[…]" }), path);
                for (number, item) in (1..).zip(items.iter().take(*max)) {
                    let path = format!("{path}.{number}.member");
                    if item.is_null() {
                        self.violated(" null", &path, "not be null");
                    } else {
                        self.value(of, item, &path)?;
                    }
                }
            }
            Shape::Map { key, value: of, max } => {
                let entries = value.as_object().ok_or_else(|| serialization("Expected map or null"))?;
                self.length(entries.len(), 0, *max, "", path);
                for (name, value) in entries.iter().take(*max) {
                    self.value(key, &Value::String(name.clone()), &format!("{path}.key"))?;
                    let path = format!("{path}.{}.member", cut(name));
                    if value.is_null() {
                        self.violated(" null", &path, "not be null");
                    } else {
                        self.value(of, value, &path)?;
                    }
                }
            }
            Shape::Structure(members) => {
                self.members(members, value, path)?;
            }
            Shape::Union(members) => {
                if self.members(members, value, path)? != 1 {
                    self.violated("", path, "have exactly one member set");
                }
            }
        }
        Ok(())
    }

    /// Checks the members and counts those that are set.
    fn members(&mut self, members: &[Member], value: &Value, path: &str) -> Result<usize, ApiError> {
        // The words of AWS's parser for a scalar where a structure belongs (M80).
        let object = value.as_object().ok_or_else(|| serialization("Expected null"))?;
        let mut n_set = 0;
        for member in members {
            let path = if path.is_empty() { member.name.to_owned() } else { format!("{path}.{}", member.name) };
            match object.get(member.name).filter(|value| !value.is_null()) {
                Some(value) => {
                    n_set += 1;
                    self.value(member.shape, value, &path)?;
                }
                None if member.required => self.violated(" null", &path, "not be null"),
                None => {}
            }
        }
        Ok(n_set)
    }

    fn length(&mut self, length: usize, min: usize, max: usize, shown: &str, path: &str) {
        if length < min {
            self.violated(shown, path, &format!("have length greater than or equal to {min}"));
        } else if length > max {
            self.violated(shown, path, &format!("have length less than or equal to {max}"));
        }
    }
}

fn cut(text: &str) -> String {
    text.chars().take(SHOWN_CHARS).collect()
}

fn shown(text: &str) -> String {
    format!(" '{}'", cut(text))
}

pub(crate) fn serialization(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorKind::Serialization, message)
}

fn mistyped(value: &Value, wanted: &str) -> ApiError {
    let is = match value {
        Value::Null => "NULL_VALUE",
        Value::Bool(true) => "TRUE_VALUE",
        Value::Bool(false) => "FALSE_VALUE",
        Value::Number(number) if number.is_f64() => "DECIMAL_VALUE",
        Value::Number(_) => "NUMBER_VALUE",
        Value::String(_) => "STRING_VALUE",
        Value::Array(_) => "START_ARRAY",
        Value::Object(_) => "START_OBJECT",
    };
    serialization(format!("{is} can not be converted to {wanted}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model_shapes as shapes;

    fn told(shape: &Shape, input: Value) -> String {
        match check(shape, &input, &[("idlePolicy.maxIdleDurationSeconds", 60)]) {
            Ok(()) => String::new(),
            Err(error) => error.message.unwrap(),
        }
    }

    /// Rows with a source in aws-behaviour §3.2, §4 and §7.3 are marked with it.
    #[test]
    fn violations_are_worded_as_aws_words_them() {
        let long = "x".repeat(4097);
        // 2,049 letters of two bytes each are too long as well, 2,048 are not.
        let (wide, fits) = ("ä".repeat(2_049), "ä".repeat(2_048));
        let one = |rule: &str| format!("1 validation error detected: Value {rule}");
        for (input, expected) in [
            (json!({"imageIdentifier": "a"}), String::new()),
            (json!({"imageIdentifier": "a", "unknown": [1], "idlePolicy": null}), String::new()),
            // §3.2
            (
                json!({"imageIdentifier": "a", "idlePolicy": {"maxIdleDurationSeconds": 60, "suspendedDurationSeconds": 0}}),
                one("null at 'idlePolicy.autoResumeEnabled' failed to satisfy constraint: Member must not be null"),
            ),
            // §4
            (
                json!({"imageIdentifier": "a", "runHookPayload": long}),
                one("at 'runHookPayload' failed to satisfy constraint: Member must have length less than or equal to 4096"),
            ),
            (
                json!({"imageIdentifier": "a", "runHookPayload": wide}),
                one("at 'runHookPayload' failed to satisfy constraint: Member must have length less than or equal to 4096"),
            ),
            (json!({"imageIdentifier": "a", "runHookPayload": fits}), String::new()),
            (json!({}), one("null at 'imageIdentifier' failed to satisfy constraint: Member must not be null")),
            (json!({"imageIdentifier": ""}), one("'' at 'imageIdentifier' failed to satisfy constraint: Member must have length greater than or equal to 1")),
            (
                json!({"imageIdentifier": "a", "maximumDurationInSeconds": 28_801}),
                one("'28801' at 'maximumDurationInSeconds' failed to satisfy constraint: Member must have value less than or equal to 28800"),
            ),
            (
                json!({"imageIdentifier": "a", "idlePolicy": {"maxIdleDurationSeconds": 59, "suspendedDurationSeconds": 0, "autoResumeEnabled": true}}),
                one("'59' at 'idlePolicy.maxIdleDurationSeconds' failed to satisfy constraint: Member must have value greater than or equal to 60"),
            ),
            (
                json!({"maximumDurationInSeconds": 0, "clientToken": ""}),
                "3 validation errors detected: Value null at 'imageIdentifier' failed to satisfy constraint: Member must not be null; \
                 Value '0' at 'maximumDurationInSeconds' failed to satisfy constraint: Member must have value greater than or equal to 1; \
                 Value '' at 'clientToken' failed to satisfy constraint: Member must have length greater than or equal to 1"
                    .to_owned(),
            ),
        ] {
            assert_eq!(told(&shapes::RUN_MICROVM, input), expected);
        }
    }

    #[test]
    fn port_specifications_are_a_union() {
        let token = |ports: Value| told(&shapes::CREATE_AUTH_TOKEN, json!({"microvmIdentifier": "m", "expirationInMinutes": 5, "allowedPorts": ports}));
        for good in [json!([{"port": 1}]), json!([{"range": {"startPort": 1, "endPort": 65535}}, {"allPorts": {}}]), json!([{"allPorts": {}, "port": null}])] {
            assert_eq!(token(good), "");
        }
        for (ports, expected) in [
            (json!([]), "Value '[]' at 'allowedPorts' failed to satisfy constraint: Member must have length greater than or equal to 1"),
            (json!([{}]), "Value at 'allowedPorts.1.member' failed to satisfy constraint: Member must have exactly one member set"),
            (json!([{"port": 1, "allPorts": {}}]), "exactly one member"),
            (json!([{"port": 0}]), "Value '0' at 'allowedPorts.1.member.port' failed to satisfy constraint: Member must have value greater than or equal to 1"),
            (json!([{"port": 1}, {"port": 65536}]), "'allowedPorts.2.member.port'"),
            (json!([{"range": {"startPort": 1}}]), "Value null at 'allowedPorts.1.member.range.endPort'"),
            (json!([null]), "Value null at 'allowedPorts.1.member'"),
            (json!([{"allPorts": true}]), "Expected null"),
            (json!({"port": 1}), "Expected list or null"),
            (json!([{"port": "8080"}]), "STRING_VALUE can not be converted to an Integer"),
            (json!([{"port": 80.5}]), "DECIMAL_VALUE can not be converted to an Integer"),
            (json!([{"port": 18_446_744_073_709_551_615_u64}]), "NUMBER_VALUE can not be converted to an Integer"),
        ] {
            let told = token(ports.clone());
            assert!(told.contains(expected), "{ports}: {told}");
        }
    }

    #[test]
    fn image_requests_are_checked_to_the_last_member() {
        let good = json!({
            "name": "hello", "baseImageArn": "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1",
            "buildRoleArn": "arn:aws:iam::000000000000:role/build", "codeArtifact": {"uri": "s3://b/k"},
            "tags": {"a b": "ä/1"}, "environmentVariables": {"K": ""}, "resources": [{"minimumMemoryInMiB": 512}],
            "hooks": {"port": 9000, "microvmHooks": {"run": "DISABLED"}}, "logging": {"cloudWatch": {"logGroup": "/a", "logStream": "x"}},
        });
        assert_eq!(told(&shapes::CREATE_IMAGE, good.clone()), "");
        for (member, value, expected) in [
            ("name", json!("a b"), "Value 'a b' at 'name' failed to satisfy constraint: Member must satisfy regular expression pattern: [a-zA-Z0-9-_]+"),
            ("name", json!("x".repeat(65)), "length less than or equal to 64"),
            ("buildRoleArn", json!("arn:aws:iam::1:role/build"), "regular expression pattern: arn:aws[a-z\\-]*:iam"),
            ("buildRoleArn", json!("role"), "2 validation errors"),
            ("codeArtifact", json!({}), "Value at 'codeArtifact' failed to satisfy constraint: Member must have exactly one member set"),
            ("codeArtifact", json!("s3://b/k"), "Expected null"),
            ("environmentVariables", json!({"A B": "x"}), "'environmentVariables.key'"),
            ("environmentVariables", json!({"A": 1}), "NUMBER_VALUE can not be converted to a String"),
            ("environmentVariables", json!({"A": "x".repeat(4097)}), "Value at 'environmentVariables.A.member' failed"),
            ("environmentVariables", (0..101).map(|n| (format!("K{n}"), json!(""))).collect(), "length less than or equal to 100"),
            ("resources", json!([{"minimumMemoryInMiB": 512}, {"minimumMemoryInMiB": 512}]), "'resources' failed to satisfy constraint: Member must have length less than or equal to 1"),
            ("hooks", json!({"microvmHooks": {"run": "ON"}}), "Member must satisfy enum value set: [DISABLED, ENABLED]"),
            ("hooks", json!({"port": 0}), "'hooks.port'"),
            ("cpuConfigurations", json!([{}]), "'cpuConfigurations.1.member.architecture'"),
            ("tags", json!({"a\n": "x"}), "'tags.key'"),
            ("additionalOsCapabilities", json!(["SOME"]), "enum value set: [ALL]"),
            ("kmsKeyIdentifier", json!("a b"), "Value 'a b' at 'kmsKeyIdentifier' failed to satisfy constraint: Member must satisfy regular expression pattern: (arn:aws"),
            ("kmsKeyIdentifier", json!("arn:aws:kms:us-east-1:12:key/a"), "'kmsKeyIdentifier'"),
        ] {
            let mut input = good.clone();
            input[member] = value;
            let told = told(&shapes::CREATE_IMAGE, input);
            assert!(told.contains(expected), "{member}: {told}");
        }
    }

    #[test]
    fn what_must_not_be_shown_is_not_shown() {
        let secret = format!("s3cr3t{}", "x".repeat(5_000));
        let input = json!({"imageIdentifier": "a", "runHookPayload": secret, "environmentVariables": {"A": secret}});
        assert!(!told(&shapes::RUN_MICROVM, input.clone()).contains("s3cr3t"));
        assert!(!told(&shapes::CREATE_IMAGE, input).contains("s3cr3t"));
        let long = told(&shapes::CREATE_IMAGE, json!({"name": "ä".repeat(100_000)}));
        assert!(long.len() < 5_000, "{}", long.len());
    }
}
