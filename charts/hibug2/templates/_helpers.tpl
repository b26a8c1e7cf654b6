{{/*
Most helpers take one dict: root (the chart's context), service (gateway, attribute, ...: names the image) and,
for a Deployment that is not the service's server, component (names the objects) and values (its values block).
*/}}

{{- define "hibug2.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "hibug2.name" -}}
{{- printf "%s-%s" (include "hibug2.fullname" .root) (.component | default .service) -}}
{{- end -}}

{{/* The labels that every pod of a release has. */}}
{{- define "hibug2.release" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "hibug2.selector" -}}
{{ include "hibug2.release" .root }}
app.kubernetes.io/component: {{ .component | default .service }}
{{- end -}}

{{- define "hibug2.labels" -}}
{{ include "hibug2.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "hibug2.image" -}}
{{- with .root.Values.image.registry }}{{ . }}/{{ end }}hibug2-{{ .service }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion -}}
{{- end -}}

{{- define "hibug2.values" -}}
{{- get .root.Values (.values | default .service) | toYaml -}}
{{- end -}}

{{/* "yes" where a component serves gRPC to others, so that it has a Service and, with tls, a certificate. */}}
{{- define "hibug2.serves" -}}
{{- if not (has (.component | default .service) (list "tagging-workers" "enumeration-job")) -}}yes{{- end -}}
{{- end -}}

{{- define "hibug2.tls" -}}
{{- if and .root.Values.tls.enabled (include "hibug2.serves" .) -}}yes{{- end -}}
{{- end -}}

{{- define "hibug2.tlsSecret" -}}
{{- .root.Values.tls.existingSecret | default (printf "%s-tls" (include "hibug2.name" .)) -}}
{{- end -}}

{{/* Probes come without TLS: kubelets speak none to gRPC. */}}
{{- define "hibug2.healthPort" -}}
{{- if include "hibug2.tls" . -}}50052{{- else -}}50051{{- end -}}
{{- end -}}

{{/* What a component calls beside other services; networkpolicy reads it, a test holds it against the code. */}}
{{- define "hibug2.calls" -}}
{{- $component := .component | default .service -}}
{{- $calls := list "redis" "store" -}}
{{- if has $component (list "gateway" "attribute" "tagging-workers" "repair") -}}{{- $calls = append $calls "images" -}}{{- end -}}
{{- if has $component (list "attribute" "tagging-workers" "prediction") -}}{{- $calls = append $calls "llm" -}}{{- end -}}
{{- if eq $component "enumeration" -}}{{- $calls = append $calls "kubernetes" -}}{{- end -}}
{{- toYaml (append $calls "traces") -}}
{{- end -}}

{{/* The settings of one Deployment as the data of its ConfigMap. */}}
{{- define "hibug2.settings" -}}
{{- $values := .root.Values -}}
{{- $settings := dict
  "HIBUG2_LISTEN" "0.0.0.0:50051"
  "HIBUG2_METRICS_PORT" "9090"
  "HIBUG2_LOG_LEVEL" $values.logLevel
  "HIBUG2_REFLECTION" (toString $values.reflection)
  "HIBUG2_STORE_URL" $values.store.url
-}}
{{- if not $values.redis.existingSecret -}}
{{- $_ := set $settings "HIBUG2_REDIS_URL" $values.redis.url -}}
{{- end -}}
{{- with $values.traces.otlpEndpoint -}}
{{- $_ := set $settings "HIBUG2_OTLP_ENDPOINT" . -}}
{{- end -}}
{{- if include "hibug2.tls" . -}}
{{- $_ := set $settings "HIBUG2_TLS_CERT_FILE" "/etc/hibug2/tls/tls.crt" -}}
{{- $_ := set $settings "HIBUG2_TLS_KEY_FILE" "/etc/hibug2/tls/tls.key" -}}
{{- $_ := set $settings "HIBUG2_TLS_CA_FILE" "/etc/hibug2/tls/ca.crt" -}}
{{- $_ := set $settings "HIBUG2_HEALTH_PORT" (include "hibug2.healthPort" .) -}}
{{- /* people come to the gateway without a certificate */ -}}
{{- if ne .service "gateway" -}}
{{- $_ := set $settings "HIBUG2_TLS_CLIENT_CA_FILE" "/etc/hibug2/tls/ca.crt" -}}
{{- end -}}
{{- end -}}
{{- if has .service (list "gateway" "attribute" "tagging" "repair") -}}
{{- $_ := set $settings "HIBUG2_IMAGE_PREFIXES" (join "," $values.images.prefixes) -}}
{{- end -}}
{{- if and $values.llm.baseUrl (has .service (list "attribute" "tagging" "prediction")) -}}
{{- $_ := set $settings "HIBUG2_LLM_BASE_URL" $values.llm.baseUrl -}}
{{- $_ := set $settings "HIBUG2_LLM_MODEL" $values.llm.model -}}
{{- end -}}
{{- if eq .service "gateway" -}}
{{- $_ := set $settings "HIBUG2_HTTP_PORT" "8080" -}}
{{- range list "attribute" "tagging" "enumeration" "prediction" "repair" -}}
{{- $address := printf "dns:///%s:50051" (include "hibug2.name" (dict "root" $.root "service" .)) -}}
{{- $_ := set $settings (printf "HIBUG2_%s_ADDRESS" (upper .)) $address -}}
{{- end -}}
{{- end -}}
{{- if and (eq .service "enumeration") $values.jobs.enabled -}}
{{- $_ := set $settings "HIBUG2_JOBS_ENABLED" "true" -}}
{{- $_ := set $settings "HIBUG2_JOBS_NAMESPACE" .root.Release.Namespace -}}
{{- $_ := set $settings "HIBUG2_JOBS_IMAGE" (include "hibug2.image" .) -}}
{{- $_ := set $settings "HIBUG2_JOBS_SERVICE_ACCOUNT" (printf "%s-job" (include "hibug2.name" .)) -}}
{{- $_ := set $settings "HIBUG2_JOBS_MIN_SLICES" (int64 $values.jobs.minSlices | toString) -}}
{{- end -}}
{{- $own := (include "hibug2.values" . | fromYaml).settings | default dict -}}
{{- toYaml (merge dict $own $settings) -}}
{{- end -}}

{{/* Everything of one component: settings, Deployment, Service, scaling, disruptions, network, certificate. */}}
{{- define "hibug2.component" -}}
{{ include "hibug2.configmap" . }}
---
{{ include "hibug2.deployment" . }}
{{- if include "hibug2.serves" . }}
---
{{ include "hibug2.service" . }}
{{- end }}
---
{{ include "hibug2.disruptions" . }}
{{- $own := include "hibug2.values" . | fromYaml }}
{{- if ne $own.autoscaling.mode "none" }}
---
{{ include (printf "hibug2.%s" $own.autoscaling.mode) . }}
{{- end }}
{{- if .root.Values.networkPolicy.enabled }}
---
{{ include "hibug2.network" . }}
{{- end }}
{{- if and (include "hibug2.tls" .) (not .root.Values.tls.existingSecret) }}
---
{{ include "hibug2.certificate" . }}
{{- end }}
{{- end -}}

{{- define "hibug2.configmap" -}}
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ include "hibug2.name" . }}
  labels:
    {{- include "hibug2.labels" . | nindent 4 }}
data:
  {{- include "hibug2.settings" . | nindent 2 }}
{{- end -}}

{{/* Headless but for the gateway: round_robin in the callers needs every pod's address. */}}
{{- define "hibug2.service" -}}
{{- $tls := eq (include "hibug2.tls" .) "yes" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "hibug2.name" . }}
  labels:
    {{- include "hibug2.labels" . | nindent 4 }}
spec:
  {{- if ne .service "gateway" }}
  clusterIP: None
  {{- end }}
  selector:
    {{- include "hibug2.selector" . | nindent 4 }}
  ports:
    - name: grpc
      port: 50051
      targetPort: grpc
      appProtocol: {{ $tls | ternary "https" "kubernetes.io/h2c" }}
    {{- if eq .service "gateway" }}
    - name: http
      port: 8080
      targetPort: http
      appProtocol: {{ $tls | ternary "https" "http" }}
    {{- end }}
{{- end -}}

{{- define "hibug2.disruptions" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "hibug2.name" . }}
  labels:
    {{- include "hibug2.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ (include "hibug2.values" . | fromYaml).maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "hibug2.selector" . | nindent 6 }}
{{- end -}}

{{- define "hibug2.certificate" -}}
{{- $name := include "hibug2.name" . -}}
{{- $namespace := .root.Release.Namespace -}}
apiVersion: cert-manager.io/v1
kind: Certificate
metadata:
  name: {{ $name }}
  labels:
    {{- include "hibug2.labels" . | nindent 4 }}
spec:
  secretName: {{ include "hibug2.tlsSecret" . }}
  commonName: {{ $name | trunc 64 }}
  dnsNames:
    - {{ $name }}
    - {{ $name }}.{{ $namespace }}
    - {{ $name }}.{{ $namespace }}.svc
    {{- if eq .service "gateway" }}
    - localhost
    {{- range .root.Values.tls.hostnames }}
    - {{ . }}
    {{- end }}
    {{- end }}
  usages: [digital signature, key encipherment, server auth, client auth]
  privateKey:
    algorithm: ECDSA
    rotationPolicy: Always
  issuerRef:
    name: {{ .root.Values.tls.issuer.name }}
    kind: {{ .root.Values.tls.issuer.kind }}
{{- end -}}
