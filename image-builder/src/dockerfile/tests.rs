use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Dockerfile {
    Dockerfile::parse(text.as_bytes()).unwrap()
}

fn images(text: &str) -> Vec<String> {
    parse(text).images.into_iter().map(|image| image.reference).collect()
}

fn error(text: &str) -> String {
    Dockerfile::parse(text.as_bytes()).unwrap_err().to_string()
}

#[test]
fn images_are_found_wherever_they_are_named() {
    for (text, expected) in [
        ("FROM debian:12\n", vec!["debian:12"]),
        ("from debian\n", vec!["debian"]),
        ("# syntax=docker/dockerfile:1\n\nFROM --platform=linux/arm64 a/b:1 AS x\nFROM X\nFROM scratch\n", vec!["a/b:1"]),
        ("ARG TAG=12\nARG BASE=\"debian:${TAG}\"\nFROM $BASE\n", vec!["debian:12"]),
        ("ARG A=x B=y\nFROM ${A}/${B:-no}:${C:-1}${A:+2}$C\n", vec!["x/y:12"]),
        ("FROM a-$TARGETARCH\n", if cfg!(target_arch = "aarch64") { vec!["a-arm64"] } else { vec!["a-amd64"] }),
        ("FROM a as build\nFROM b\nCOPY --from=build /x /x\nCOPY --from=0 /y /y\nCOPY --from=c:1 /z /z\n", vec!["a", "b", "c:1"]),
        ("FROM a\nRUN --mount=type=bind,from=tools,target=/t /t/run\n", vec!["a", "tools"]),
        ("FROM a\nFROM a\n", vec!["a"]),
        ("FROM \\\n  a\n", vec!["a"]),
        ("\u{feff}FROM a\r\nRUN x\r\n", vec!["a"]),
        ("FROM a\nRUN echo \\\n# a comment inside\n FROM b\n", vec!["a"]),
        ("FROM a\nRUN <<EOF\nFROM b\nEOF\n", vec!["a"]),
    ] {
        assert_eq!(images(text), expected, "{text}");
    }
}

#[test]
fn what_cannot_be_read_names_its_line() {
    assert!(error("FROM a\n\nFOO bar\n").starts_with("Dockerfile line 3: "), "{}", error("FROM a\n\nFOO bar\n"));
    assert!(error("RUN x\nFROM a\n").starts_with("Dockerfile line 1: "));
    assert!(error("ARG X\nFROM $X\n").contains("line 2: FROM $X names no image"));
    assert!(error("FROM a\nRUN cat <<EOF\nhello there\nEOF\n").contains("line 3: ") && error("FROM a\nRUN cat <<EOF\nhello\nEOF\n").contains("directly behind RUN"));
    assert!(error("FROM a\nCOPY <<EOF /x\nhi\nEOF\n").contains("line 2: COPY and ADD with a here-document"));
    assert!(error("").contains("cannot be read"), "{}", error(""));
    assert!(matches!(Dockerfile::parse(b"FROM \xff"), Err(DockerfileError::NotText)));
    assert!(matches!(Dockerfile::parse(b"FROM a\0b"), Err(DockerfileError::NotText)));
    assert!(matches!(Dockerfile::parse(&vec![b'#'; MAX_BYTES + 1]), Err(DockerfileError::TooLarge)));
}

#[test]
fn a_step_of_the_build_is_found_on_its_line() {
    let file = parse("ARG X=1\nFROM a as b\n\nRUN one && \\\n  two\nFROM c\n# comment\nEXPOSE 80\nCMD x\n");
    let line = |stage, step, total| file.step(stage, step, total).map(|step| (step.line, step.text.as_str()));
    assert_eq!(line(Some(1), 1, 2), Some((2, "FROM a as b")));
    assert_eq!(line(Some(1), 2, 2), Some((4, "RUN one && …")));
    assert_eq!(line(Some(2), 3, 3), Some((9, "CMD x")));
    assert_eq!(line(None, 2, 3), Some((8, "EXPOSE 80")), "without a stage it is the last one");
    // Two triggers of the base image come first.
    assert_eq!(line(Some(2), 4, 5), Some((8, "EXPOSE 80")));
    assert_eq!(line(Some(2), 5, 5), Some((9, "CMD x")));
    assert_eq!(line(Some(3), 1, 1), None);
    assert_eq!(line(Some(0), 1, 1), None);
}

#[test]
fn a_platform_is_left_out_and_said_so() {
    let file = parse("FROM --platform=linux/arm64 a AS b\nRUN x\n");
    assert_eq!(file.text, format!("FROM {} a AS b\nRUN x\n", " ".repeat(22)));
    assert!(file.notes[0].contains("line 1: --platform=linux/arm64 is left out"), "{:?}", file.notes);
}

#[test]
fn here_documents_become_commands() {
    let file = parse("FROM a\nRUN <<EOF\necho \"$HOME\"\necho two\\\n three\nEOF\nCMD x\n");
    assert_eq!(file.text, "FROM a\nRUN [\"/bin/sh\",\"-c\",\"echo \\\"$HOME\\\"\\necho two\\\\\\n three\\n\"]\nCMD x\n");
    assert_eq!(file.step(None, 3, 3).unwrap().line, 7, "lines are those of the user's file");
    let file = parse("FROM a\nSHELL [\"bash\", \"-eu\", \"-c\"]\nRUN --network=none <<'E'\nx\nE");
    assert!(file.text.ends_with("RUN --network=none [\"bash\",\"-eu\",\"-c\",\"x\\n\"]"), "{}", file.text);
    let file = parse("FROM a\nRUN <<EOF\n#!/usr/bin/python3\nprint(1)\nEOF\n");
    assert!(file.text.contains("mktemp") && file.text.contains("#!/usr/bin/python3\\nprint(1)\\n"), "{}", file.text);
}

#[test]
fn exposed_ports_of_the_last_stage_keep_their_order() {
    assert_eq!(parse("FROM a\nEXPOSE 1\nFROM b\nEXPOSE 9000 80/tcp\nEXPOSE 53/udp $PORT 443\n").exposed, [9000, 80, 53, 443]);
}

proptest! {
    /// Whatever is written, reading it ends in an answer.
    #[test]
    fn any_text_is_read_or_refused(lines in prop::collection::vec(prop_oneof![
        Just("FROM a AS b".to_owned()), Just("RUN <<EOF".to_owned()), Just("EOF".to_owned()), Just("COPY --from=b x y".to_owned()),
        Just("ARG A=$A".to_owned()), Just("FROM ${A:-x".to_owned()), Just("SHELL [\"x\"]".to_owned()), "[ -~]{0,30}", "\\PC{0,10}",
    ], 0..12)) {
        let _ = Dockerfile::parse(lines.join("\n").as_bytes());
    }
}
