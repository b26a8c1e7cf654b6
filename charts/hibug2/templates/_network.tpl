{{/* Egress to a system outside the chart; `to` empty: anywhere on that port. */}}
{{- define "hibug2.egress" -}}
- ports:
    - protocol: TCP
      port: {{ .port }}
  {{- with .to }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "hibug2.dns" -}}
- ports:
    - protocol: UDP
      port: 53
    - protocol: TCP
      port: 53
  {{- with .Values.networkPolicy.dnsTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* "yes" where the values make use of an outside system that the component's code can call. */}}
{{- define "hibug2.uses" -}}
{{- $values := .root.Values -}}
{{- if eq .system "redis" -}}yes
{{- else if eq .system "store" -}}{{- if not (hasPrefix "file://" $values.store.url) -}}yes{{- end -}}
{{- else if eq .system "images" -}}{{- range $values.images.prefixes -}}{{- if not (hasPrefix "file://" .) -}}yes{{- end -}}{{- end -}}
{{- else if eq .system "llm" -}}{{- if $values.llm.baseUrl -}}yes{{- end -}}
{{- else if eq .system "traces" -}}{{- if $values.traces.otlpEndpoint -}}yes{{- end -}}
{{- else if eq .system "kubernetes" -}}{{- if $values.jobs.enabled -}}yes{{- end -}}
{{- else -}}{{- fail (printf "no rule says when %s is used" .system) -}}
{{- end -}}
{{- end -}}

{{- define "hibug2.outside" -}}
{{- $values := .root.Values -}}
{{- $ports := dict
  "redis" $values.redis.port
  "store" $values.store.port
  "images" $values.images.port
  "llm" $values.llm.port
  "traces" $values.traces.port
  "kubernetes" $values.networkPolicy.kubernetesPort
-}}
{{- range $system := include "hibug2.calls" . | fromYamlArray }}
{{- if include "hibug2.uses" (dict "root" $.root "system" $system) }}
{{ include "hibug2.egress" (dict "port" (get $ports $system) "to" (get $values.networkPolicy (printf "%sTo" $system))) }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "hibug2.network" -}}
{{- $policy := .root.Values.networkPolicy -}}
{{- $metrics := .root.Values.metrics.serviceMonitor.enabled -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "hibug2.name" . }}
  labels:
    {{- include "hibug2.labels" . | nindent 4 }}
spec:
  podSelector:
    matchLabels:
      {{- include "hibug2.selector" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
  {{- if or (include "hibug2.serves" .) $metrics $policy.metricsFrom }}
  ingress:
    {{- if eq .service "gateway" }}
    - ports:
        - protocol: TCP
          port: 50051
        - protocol: TCP
          port: 8080
      {{- with $policy.gatewayFrom }}
      from:
        {{- toYaml . | nindent 8 }}
        - podSelector:
            matchLabels:
              {{- include "hibug2.selector" (dict "root" $.root "service" "test") | nindent 14 }}
      {{- end }}
    {{- else if include "hibug2.serves" . }}
    - ports:
        - protocol: TCP
          port: 50051
      from:
        - podSelector:
            matchLabels:
              {{- include "hibug2.selector" (dict "root" .root "service" "gateway") | nindent 14 }}
    {{- end }}
    {{- if or $metrics $policy.metricsFrom }}
    - ports:
        - protocol: TCP
          port: 9090
      {{- with $policy.metricsFrom }}
      from:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    {{- end }}
  {{- end }}
  egress:
    {{- include "hibug2.dns" .root | nindent 4 }}
    {{- include "hibug2.outside" . | nindent 4 }}
    {{- if eq .service "gateway" }}
    {{- range list "attribute" "tagging" "enumeration" "prediction" "repair" }}
    - ports:
        - protocol: TCP
          port: 50051
      to:
        - podSelector:
            matchLabels:
              {{- include "hibug2.selector" (dict "root" $.root "service" .) | nindent 14 }}
    {{- end }}
    {{- end }}
{{- end -}}
