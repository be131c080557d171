//! ARNs of this node: written for what it has, read from what callers name.

use model::{Egress, ImageName, ImageVersion};

use crate::reply::{ApiError, ErrorKind};

/// The one managed image there is (aws-behaviour §5.1).
pub(crate) const MANAGED_IMAGE: &str = "al2023-1";
/// The managed image's versions.
pub(crate) const MANAGED_VERSIONS: [ImageVersion; 2] = [ImageVersion { major: 0, minor: 0 }, ImageVersion { major: 1, minor: 0 }];

/// The managed ingress connectors (aws-behaviour §6).
pub(crate) const INGRESS: [&str; 4] = ["HTTP_INGRESS", "ALL_INGRESS", "SHELL_INGRESS", "NO_INGRESS"];
/// The managed egress connectors.
pub(crate) const EGRESS: [&str; 2] = ["INTERNET_EGRESS", NO_EGRESS];
/// Ours: AWS has no connector that keeps a microVM from the network (aws-behaviour §6).
const NO_EGRESS: &str = "NO_EGRESS";

/// Where the node says it is.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) region: String,
    pub(crate) account: String,
}

/// How an operation words that an identifier is none (aws-behaviour §7.2).
#[derive(Debug, Clone, Copy)]
pub(crate) enum Wording {
    /// RunMicrovm, ListMicrovms.
    Run,
    /// The operations on images.
    Image,
}

impl Place {
    pub(crate) fn image_arn(&self, name: &ImageName) -> String {
        format!("arn:aws:lambda:{}:{}:microvm-image:{name}", self.region, self.account)
    }

    pub(crate) fn managed_image_arn(&self) -> String {
        format!("arn:aws:lambda:{}:aws:microvm-image:{MANAGED_IMAGE}", self.region)
    }

    pub(crate) fn connector_arn(&self, name: &str) -> String {
        format!("arn:aws:lambda:{}:aws:network-connector:aws-network-connector:{name}", self.region)
    }

    /// The image that an ARN or (more than AWS takes) a plain name names.
    pub(crate) fn image_name(&self, identifier: &str, wording: Wording) -> Result<ImageName, ApiError> {
        let malformed = || {
            ApiError::validation(match wording {
                Wording::Run => "Malformed ARN - doesn't start with 'arn:'".to_owned(),
                Wording::Image => format!("Invalid ARN format: {identifier}"),
            })
        };
        if !identifier.starts_with("arn:") {
            return identifier.parse().map_err(|_| malformed());
        }
        let parts: Vec<&str> = identifier.splitn(7, ':').collect();
        let [_, _, service, region, account, kind, name] = parts[..] else {
            // `…:microvm-image/<name>` is refused by AWS's policy engine, not by its parser.
            return Err(if identifier.contains(":microvm-image/") { ApiError::silent(ErrorKind::AccessDenied) } else { malformed() });
        };
        if service != "lambda" || kind != "microvm-image" {
            return Err(malformed());
        }
        if region != self.region || account != self.account {
            return Err(ApiError::silent(ErrorKind::AccessDenied));
        }
        name.parse().map_err(|_| unknown_image(identifier))
    }

    /// Whether an ARN or plain name names the managed image.
    pub(crate) fn is_managed_image(&self, identifier: &str) -> bool {
        identifier == MANAGED_IMAGE || identifier == self.managed_image_arn()
    }

    /// Where these egress connectors let a microVM connect to.
    pub(crate) fn egress(&self, connectors: &[String]) -> Egress {
        let none = self.connector_arn(NO_EGRESS);
        if connectors.contains(&none) { Egress::Nothing } else { Egress::Internet }
    }

    /// Checks one network connector; the name of a managed one.
    pub(crate) fn connector<'a>(&self, arn: &'a str, known: &[&str]) -> Result<&'a str, ApiError> {
        if !arn.starts_with("arn:") || arn.split(':').count() < 7 {
            return Err(ApiError::validation("Malformed network connector ARN"));
        }
        match arn.strip_prefix(&self.connector_arn("")) {
            Some(name) if known.contains(&name) => Ok(name),
            Some(_) => Err(ApiError::validation(format!("Unrecognized managed network connector ARN: {arn}"))),
            None => Err(ApiError::validation(format!(
                "The network connector {arn} is not offered: this node has the managed connectors {}… only.",
                self.connector_arn("")
            ))),
        }
    }
}

/// AWS's words for an image that is not there.
pub(crate) fn unknown_image(arn: &str) -> ApiError {
    ApiError::not_found(format!("MicroVMImage not found for MicroVMImageID: {arn}"))
}

/// AWS's words for a version that is not there.
pub(crate) fn unknown_version(arn: &str, version: &str) -> ApiError {
    ApiError::not_found(format!("MicroVMImage not found for MicroVMImage: {arn}, Version: {version}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        Place { region: "us-east-1".to_owned(), account: "000000000000".to_owned() }
    }

    #[test]
    fn images_are_named_by_arn_or_name_and_by_nothing_else() {
        let image = |identifier: &str| place().image_name(identifier, Wording::Run);
        assert_eq!(image("hello").unwrap().as_str(), "hello");
        assert_eq!(image("arn:aws:lambda:us-east-1:000000000000:microvm-image:hello").unwrap().as_str(), "hello");
        for (identifier, kind) in [
            ("arn:aws:lambda:us-east-1:000000000000:microvm-image/hello", ErrorKind::AccessDenied),
            ("arn:aws:lambda:eu-west-1:000000000000:microvm-image:hello", ErrorKind::AccessDenied),
            ("arn:aws:lambda:us-east-1:111111111111:microvm-image:hello", ErrorKind::AccessDenied),
            ("arn:aws:lambda:us-east-1:000000000000:function:hello", ErrorKind::Validation),
            ("arn:aws:s3:us-east-1:000000000000:microvm-image:hello", ErrorKind::Validation),
            ("arn:aws:lambda:us-east-1:000000000000:microvm-image:", ErrorKind::ResourceNotFound),
            ("arn:aws:lambda:us-east-1:000000000000:microvm-image:../x", ErrorKind::ResourceNotFound),
            ("arn:aws:lambda:us-east-1:000000000000:microvm-image:a:b", ErrorKind::ResourceNotFound),
            ("arn:", ErrorKind::Validation),
            ("../x", ErrorKind::Validation),
            ("arn%3Aaws", ErrorKind::Validation),
            ("", ErrorKind::Validation),
        ] {
            assert_eq!(image(identifier).unwrap_err().kind, kind, "{identifier}");
        }
    }

    #[test]
    fn connectors_are_the_managed_ones() {
        let known = ["HTTP_INGRESS"];
        let place = place();
        assert_eq!(place.egress(&[place.connector_arn("NO_EGRESS")]), Egress::Nothing);
        assert_eq!(place.egress(&[place.connector_arn("INTERNET_EGRESS")]), Egress::Internet);
        assert_eq!(place.connector(&place.connector_arn("HTTP_INGRESS"), &known), Ok("HTTP_INGRESS"));
        for (arn, told) in [
            ("HTTP_INGRESS".to_owned(), "Malformed network connector ARN"),
            (place.connector_arn("NO_EGRESS"), "Unrecognized managed network connector ARN: arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:NO_EGRESS"),
            ("arn:aws:lambda:us-east-1:000000000000:network-connector:nc-1".to_owned(), "not offered"),
        ] {
            assert!(place.connector(&arn, &known).unwrap_err().message.unwrap().contains(told), "{arn}");
        }
    }
}
