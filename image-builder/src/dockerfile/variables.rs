//! Variables in FROM: the ARGs above the first stage, with the forms of `${…}` that Dockerfiles have.

use std::collections::BTreeMap;

/// This node's kind of CPU, as images spell it.
pub(super) const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };

/// What every Dockerfile may use without an ARG of its own.
pub(super) fn predefined() -> BTreeMap<String, String> {
    let platform = format!("linux/{ARCHITECTURE}");
    let mut variables = BTreeMap::new();
    for side in ["BUILD", "TARGET"] {
        variables.insert(format!("{side}PLATFORM"), platform.clone());
        variables.insert(format!("{side}OS"), "linux".to_owned());
        variables.insert(format!("{side}ARCH"), ARCHITECTURE.to_owned());
        variables.insert(format!("{side}VARIANT"), String::new());
    }
    variables
}

/// Adds the variables of one ARG: `NAME=value`, quoted or not, several in a row, or `NAME` alone (which sets nothing).
pub(super) fn define(variables: &mut BTreeMap<String, String>, arguments: &str) {
    for word in words(arguments) {
        if let Some((name, value)) = word.split_once('=') {
            let value = expand(value, variables);
            variables.insert(name.to_owned(), value);
        }
    }
}

/// Splits at blanks outside of quotes, and takes the quotes off.
fn words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in text.chars() {
        match (quote, c) {
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (Some(open), c) if c == open => quote = None,
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// `$NAME`, `${NAME}`, `${NAME:-otherwise}`, `${NAME:+instead}`; what is not known is empty.
pub(super) fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let text = text.trim_matches(['"', '\'']);
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let known = |name: &str| variables.get(name).map(String::as_str).filter(|value| !value.is_empty());
        if let Some((inner, behind)) = after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            if let Some((name, otherwise)) = inner.split_once(":-") {
                out.push_str(known(name).unwrap_or(otherwise));
            } else if let Some((name, instead)) = inner.split_once(":+") {
                out.push_str(known(name).map_or("", |_| instead));
            } else {
                out.push_str(known(inner).unwrap_or_default());
            }
            rest = behind;
        } else {
            let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
            out.push_str(known(&after[..end]).unwrap_or_default());
            rest = &after[end..];
        }
    }
    out.push_str(rest);
    out
}
